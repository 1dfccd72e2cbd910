"""Prompts whose truth is a phrase: words of one's own, people, and unseen combinations."""

from __future__ import annotations

from itertools import product

from diffusionfm.colors import COLORS
from diffusionfm.phrasing import article, on_background

OWN_WORDS = {
    "trainers": "running shoe", "an automobile for racing": "racing car", "a thing that tells the time": "watch",
    "a thing that wakes you in the morning": "alarm clock", "a bunny with floppy ears": "rabbit", "a puppy": "dog",
    "a kitty": "cat", "king of the jungle": "leopard", "an animal with a trunk": "elephant",
    "a bird that cannot fly and lives on ice": "penguin", "a sea animal with eight arms": "octopus",
    "something to keep the rain off": "umbrella", "what a queen wears on her head": "crown",
    "specs for reading": "glasses", "a gadget for taking photos": "camera", "a portable computer": "laptop",
    "a thing with six strings you strum": "guitar", "an aeroplane": "airplane", "a chopper in the sky": "helicopter",
    "a vehicle that flies to the moon": "rocket", "a push bike": "bicycle", "a lorry on the road": "truck",
    "a vehicle that rushes people to hospital": "ambulance", "a cab": "taxi", "a double decker": "bus",
    "a yacht on the sea": "sailboat", "the star at the centre of our solar system": "sun",
    "a flake of winter weather": "snowflake", "a man made of snow": "snowman", "a twister": "tornado",
    "an arc of seven colours in the sky": "rainbow", "what burns in a fireplace": "fire", "a blaze": "fire",
    "a device to cut paper": "scissors", "a tool for driving in nails": "hammer", "a tool to turn bolts": "wrench",
    "something that opens a lock": "key", "a thing you write with in ink": "pen", "an HB with a rubber": "pencil",
    "a bag you wear on your shoulders": "backpack", "a carrier with handles for a lady": "handbag",
    "something that shows north": "compass", "a tube to look at the stars": "telescope",
    "a scientist's tool to see tiny things": "microscope", "a needle for a vaccine": "syringe",
    "a doctor's listening tool": "stethoscope",
    "a tablet of medicine": "pill", "the head bone of a pirate flag": "skull",
    "a spook": "ghost", "a visitor from outer space": "alien", "a mechanical man": "robot",
    "a quarter pounder": "hamburger", "chips with ketchup": "french fries", "a slice with pepperoni": "pizza",
    "a frankfurter in a bun": "hot dog", "a long yellow fruit": "banana", "a spiky tropical fruit": "pineapple",
    "a bunch of fruit for making wine": "grapes", "a big green fruit with red flesh": "watermelon",
    "a sour yellow fruit": "lemon", "a pair of small red fruits": "cherries", "a maize cob": "ear of corn",
    "a glossy purple vegetable": "eggplant", "a loaf": "bread", "a breakfast pastry from France": "croissant",
    "a sweet ring with icing": "doughnut", "a cake with candles": "birthday cake", "a pint": "beer mug",
    "a goblet of red": "wine glass", "a cup of coffee": "hot beverage", "an insect that makes honey": "honeybee",
    "an insect with big colourful wings": "butterfly", "a web maker with eight legs": "spider",
    "a slow animal with a shell": "turtle", "a reptile without legs": "snake", "a toad": "frog",
    "a striped big cat": "tiger", "a bear from China that eats bamboo": "panda", "a big black ape": "gorilla",
    "a nanny with horns and a beard": "goat", "a piglet": "pig", "a cockerel": "rooster", "a night bird": "owl",
    "a prickly desert plant": "cactus", "a tall yellow flower that follows the sun": "sunflower",
    "a fungus with a cap": "mushroom", "a red romantic flower": "rose", "a fir with decorations": "christmas tree",
    "a plant with four lucky leaves": "four leaf clover", "a dwelling": "house", "a fortress with towers": "castle",
    "a place where children learn": "school", "a building for the sick": "hospital",
    "a round thing to kick": "soccer ball",
    "a ball for shooting hoops": "basketball",
    "a thing to play console games with": "video game", "a box with a bow for a birthday": "wrapped gift",
    "a letter in the post": "envelope", "a lit bulb for ideas": "light bulb", "a torch for the dark": "flashlight",
}  # fmt: skip
"""What someone might type -> the corpus's phrase for it. Nobody's caption; the instrument's build checks that."""

PEOPLE = ("a person", "a doctor", "a nurse", "a teacher", "a scientist")
PEOPLE_WORDS = (
    "person", "man", "woman", "boy", "girl", "old man", "old woman", "health worker", "man health worker",
    "woman health worker", "teacher", "man teacher", "woman teacher", "man scientist", "woman scientist", "man cook",
    "woman cook", "police officer", "man student", "woman student", "bust in silhouette", "detective",
)  # fmt: skip
"""Phrases among which people are told apart, beside all others of the list."""
FRUITS = (
    "apple", "banana", "strawberry", "lemon", "pineapple", "watermelon", "cherries", "pear", "peach", "grapes",
)  # fmt: skip
ANIMALS = (
    "cat", "dog", "owl", "turtle", "elephant", "penguin", "fox", "frog", "octopus", "rabbit", "snail", "bee",
)  # fmt: skip


def unseen_candidates() -> list[str]:
    """Combinations to draw whatever was learned apart: odd fruit, robot animals, and both on a named ground."""
    inks, grounds = ("blue", "purple", "teal", "navy", "pink", "black"), tuple(COLORS)
    fruit = [article(f"{ink} {name}") for ink, name in product(inks, FRUITS)]
    robots = [
        f"{article(f'robot {name}')}{on_background(color)}" for name, color in product(ANIMALS, grounds[:6])
    ]
    both = [
        f"{fruit[k % len(fruit)]} and {article(f'robot {ANIMALS[k % 7]}')}{on_background(grounds[k % 19])}"
        for k in range(90)
    ]
    return fruit + robots + both
