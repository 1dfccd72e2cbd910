"""Fixtures that several test files share."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

WORDS = [
    "a red apple",
    "a blue fish",
    "a smiling face on white",
    "yellow star",
    "sketch of a house",
    "café, naïve",
]


def build_tiny_pipeline(seed: int = 0, depth: int = 2):
    """A whole pipeline at tiny size with random weights: 16-wide everything, 4 latent channels."""
    import torch
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from diffusionfm.autoencoder import AutoencoderKL
    from diffusionfm.pipeline import DiffusionFMPipeline
    from diffusionfm.text import build_text_encoder, train_tokenizer
    from diffusionfm.transformer import DiffusionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(WORDS, vocab_size=300, context=24)
        text_encoder = build_text_encoder(
            tokenizer, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
        vae = AutoencoderKL(
            latent_channels=4, widths=(8, 8, 16), encoder_depths=(1, 1), decoder_depths=(1, 1, 1)
        )
        transformer = DiffusionTransformer(
            in_channels=4, width=32, depth=depth, heads=2, text_dim=16, condition_dim=16, registers=2, grid=2
        )
        for network in (transformer, vae):  # zero-initialised layers would make every picture alike
            for parameter in network.parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    pipe = DiffusionFMPipeline(vae, text_encoder, tokenizer, transformer, FlowMatchEulerDiscreteScheduler())
    pipe.defaults = {"steps": 3, "guidance": 3.0, "height": 32, "width": 32, "shift": 1.0}
    return pipe


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real, tiny, random pipeline, written by save_pretrained. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipe(tiny_model: Path):
    """That pipeline, loaded. Do not change it."""
    from diffusionfm.pipeline import DiffusionFMPipeline

    return DiffusionFMPipeline.from_pretrained(tiny_model)


@pytest.fixture
def pipe(tiny_model: Path):
    """That pipeline, of the test's own: an engine owns its networks."""
    from diffusionfm.pipeline import DiffusionFMPipeline

    return DiffusionFMPipeline.from_pretrained(tiny_model)


@pytest.fixture
def engine(pipe):
    from diffusionfm.serve.engine import Engine

    with Engine(pipe) as engine:
        yield engine


@pytest.fixture
def fresh(tiny_model: Path):
    """A function that starts a server with limits or keys of its own."""
    from serving import Running

    begun = []

    def start(**options) -> Running:
        begun.append(Running(tiny_model, **options))
        return begun[-1]

    yield start
    for running in begun:
        running.stop()


@pytest.fixture(scope="module")
def api(tiny_model: Path):
    """A server for the tests of a file."""
    from serving import Running

    running = Running(tiny_model)
    yield running
    running.stop()


@pytest.fixture
def no_file_beyond() -> Callable[[int], AbstractContextManager[None]]:
    """no_file_beyond(bytes): a `with` block in which every write past that fails, as on a full disk."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)

    return limit
