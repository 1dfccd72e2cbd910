"""Words for pictures: emoji names and keywords, country names, icon-name cleaning, brands."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

SKIN_TONE = re.compile(r"[:,]?\s*\b(medium-light|medium-dark|medium|light|dark) skin tone\b,?", re.I)
TONE_SUFFIX = re.compile(r"-(medium-light|medium-dark|medium|light|dark)(-skin-tone)?$")

# Makers and products: a picture whose name holds one of these words is left out of the corpus.
BRANDS = frozenset(
    """
    adobe airbnb alipay amazon amd android angular apple-logo appstore arduino audible audi aws azure baidu
    behance binance bing bitbucket bitcoin blogger bluetooth bmw bootstrap brave chatgpt chrome chromium
    cisco citrix cloudflare codepen coinbase cpanel css3 debian dell deno discord disney docker dogecoin
    dribbble dropbox ebay edge-browser electron ethereum etsy evernote excel expedia facebook fedora figma
    finder firefox flickr foursquare github gitlab gmail gnu gnome google gopro gpay hangouts heroku html5
    hulu ibm ikea illustrator imdb instagram intel internet-explorer ios itunes java javascript jetbrains
    joomla jquery kakaotalk kde kickstarter kotlin lastfm lego lenovo linkedin linux litecoin lyft macos
    mastercard mastodon mcdonalds medium-logo mercedes messenger meta microsoft midjourney mongodb monero
    mozilla mysql myspace nasa nestle netflix netlify nginx nike nintendo node-js nodejs notion npm nvidia
    oculus openai opera oracle outlook patreon paypal pepsi periscope perl photoshop php pinterest pixiv
    playstation pokemon postgresql powerpoint prestashop producthunt python qq quora raspberry-pi react
    reddit redhat rss-logo ruby-logo safari samsung sharepoint shopify signal-app sketch-app skype slack
    slideshare snapchat sony soundcloud spotify stackoverflow steam stripe substack swift symbian telegram
    tencent tesla threads tiktok tinder tor-browser toyota travis trello tripadvisor tumblr twitch twitter
    uber ubuntu unity unreal upwork vimeo visa-card vk vkontakte volkswagen vue wechat weibo whatsapp
    whatspp wikipedia windows-logo windows-os wordpress xbox xiaomi xing yahoo yammer yandex yelp youtube
    zalo zapier zoom-app coca-cola cocacola starbucks tux mickey
    """.split()  # noqa: SIM905, a list of words reads best as words
)
NOT_A_NAME = frozenset(
    {"untitled", "unknown", "drawing", "image", "picture", "clipart", "svg", "icon", "test", "misc"}
)
# Trailing words that tell a drawing variant, not its content.
VARIANT = re.compile(
    r"(?:[-_ ](?:\d+px|\d+x\d+|flat|duo|bold|outline|outlined|filled|fill|line|solid"
    r"|alternate|alt\d*|negative|color|remix|\d+))+$"
)


@dataclass(frozen=True)
class Words:
    """What one picture shows: its phrase, other names for it, loose keywords, and what a dictionary says."""

    phrase: str
    names: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    tone: str = ""
    definition: str = ""


def clean(name: str) -> str:
    """Lower-case words of a file or icon name, without variant suffixes, separators and author tags."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKD", name))
    name = name.encode("ascii", "ignore").decode().lower()
    name = VARIANT.sub("", name)
    name = re.sub(r"[^a-z0-9'&+ -]+", " ", name).replace("-", " ")
    return re.sub(r"\s+", " ", name).strip(" '&+")


def is_brand(name: str) -> bool:
    """True when a name holds a maker's or product's word."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())
    parts = set(slug.split("-"))
    return "logo" in parts or any(b in parts or (("-" in b) and b in slug) for b in BRANDS)


@dataclass
class EmojiNames:
    """CLDR labels, other names and keywords of every emoji, found by code point or by name."""

    by_code: dict[str, Words] = field(default_factory=dict)
    by_slug: dict[str, str] = field(default_factory=dict)
    countries: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, emojibase: Path, emojilib: Path) -> EmojiNames:
        """Read the unpacked npm packages `emojibase-data` and `emojilib`."""
        read = lambda path: json.loads(path.read_text(encoding="utf-8"))  # noqa: E731
        data = read(emojibase / "en/data.json")
        shortcodes = read(emojibase / "en/shortcodes/github.json")
        extra = {code_key(char): words for char, words in read(emojilib / "dist/emoji-en-US.json").items()}
        self = cls()
        for entry in data:
            for item in [entry, *entry.get("skins", [])]:
                self._add(item, entry, shortcodes, extra)
        return self

    def _add(self, item: dict, base: dict, shortcodes: dict, extra: dict) -> None:
        code = code_key(item["hexcode"])
        label = item["label"].lower()
        tone = SKIN_TONE.search(label)
        bare = SKIN_TONE.sub("", label).strip(" :,") if tone else label
        bare = re.sub(r"^flag: (.+)$", r"flag of \1", bare)
        if label.startswith("flag: "):
            chars = [int(c, 16) - 0x1F1E6 for c in item["hexcode"].split("-")]
            if all(0 <= c < 26 for c in chars):
                self.countries["".join(chr(97 + c) for c in chars)] = item["label"][6:].lower()
        found = shortcodes.get(base["hexcode"], [])
        found = [found] if isinstance(found, str) else found
        lib = extra.get(code_key(base["hexcode"]), [])
        names = [n.replace("_", " ") for n in [*found, *lib[:1]]]
        names = [
            n
            for n in dict.fromkeys(names)
            if n != bare and n.isascii() and len(n) > 2 and "flag of" not in bare
        ]
        keywords = [k.replace("_", " ") for k in [*base.get("tags", []), *lib[1:8]]]
        self.by_code[code] = Words(
            phrase=bare,
            names=tuple(names[:3]),
            keywords=tuple(k for k in dict.fromkeys(keywords) if k != bare and k.isascii() and len(k) > 1)[
                :10
            ],
            tone=f"{tone.group(1)} skin tone" if tone else "",
        )
        for name in [label, bare if not tone else "", *(names if not tone else [])]:
            self.by_slug.setdefault(slug(name), code)

    def find(self, name: str, codes: list[str] | None = None) -> Words | None:
        """Words of an emoji by code points (any of `codes`) or else by its icon name."""
        for code in codes or []:
            if code_key(code) in self.by_code:
                return self.by_code[code_key(code)]
        key = slug(name)
        for option in (
            key,
            key.removeprefix("flagfor"),
            key + "face",
            key.removesuffix("face"),
            "flagof" + key,
        ):
            if option and option in self.by_slug:
                return self.by_code[self.by_slug[option]]
        return None


def code_key(code: str) -> str:
    """Code points as lower-case hex joined by dashes, without variation selectors; takes a character or hex."""
    if not re.fullmatch(r"[0-9a-fA-F]{2,6}([-_ ][0-9a-fA-F]{2,6})*", code):
        code = "-".join(f"{ord(c):x}" for c in code)
    parts = [p.lower().lstrip("0") or "0" for p in re.split(r"[-_ ]", code)]
    return "-".join(p for p in parts if p != "fe0f")


def slug(name: str) -> str:
    """A name's letters and digits only: a join key that survives separators and case."""
    return re.sub(
        r"[^a-z0-9]+", "", unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
    )
