"""A device that is lost: every call says so, and a chat goes on as if nothing had been."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import lines
from tiny_model import CONFIG, random_source
from wgpu.backends.wgpu_native._helpers import generate_report

from engine import Engine, Sampling
from engine.chat.commands import loop
from engine.chat.talk import Chat
from engine.device import Device
from engine.errors import DeviceLostError
from engine.generation import Generation
from engine.memory import Memory
from weights.convert import CalibrationText, convert
from weights.store import WeightsFile

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> WeightsFile:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    convert(random_source(CONFIG), path, 6, text=CalibrationText(0), progress=False)
    return WeightsFile.open(path)


def test_every_call_says_that_the_device_was_lost(file: WeightsFile, tmp_path: Path) -> None:
    engine = Engine(file, Device.open())
    generation = engine.generate([5, 6, 7], 20, stop_ids=())
    next(generation)
    engine.device.wgpu.destroy()
    calls: list[Callable[[], object]] = [
        lambda: list(generation),
        lambda: list(engine.generate([5, 6], 3)),
        lambda: engine.logits([5, 6]),
        lambda: engine.save_session(tmp_path / "talk"),
    ]
    for call in calls:
        with pytest.raises(DeviceLostError, match=r"was lost .*; open the model again") as error:
            call()
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_chat_goes_on_when_its_device_is_lost(
    file: WeightsFile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost in the middle of the second answer; all three are those of a chat without the loss."""
    opened: list[Engine] = []

    def open_model(name: str) -> Engine:
        opened.append(Engine(file, Device.open()))
        return opened[-1]

    def answers() -> str:
        chat = Chat(open_model, "tiny", Sampling(), max_tokens=9, show_stats=False)
        assert loop(chat, lines("ab", "cd", "ef")) == 0
        assert len(chat.conversation.turns) == 3
        return capsys.readouterr().out

    whole = answers()
    assert len(opened) == 1
    draw, n_read = Generation.__next__, 0

    def until_lost(self: Generation) -> int:
        nonlocal n_read
        n_read += 1
        if n_read == 14:
            opened[-1].device.wgpu.destroy()
        return draw(self)

    monkeypatch.setattr(Generation, "__next__", until_lost)
    begun = answers()
    assert len(opened) == 3 and n_read > 27
    first, second, third = whole.splitlines(keepends=True)
    assert begun.startswith(first) and begun.endswith(second + third)
    torn = begun.removeprefix(first).removesuffix(second + third).rstrip("\n")
    assert torn and second.startswith(torn)


def test_a_model_that_is_given_up_gives_back_what_it_took(file: WeightsFile) -> None:
    def held() -> dict[str, int]:
        gc.collect()
        return {kind: counts["allocated"] for kind, counts in generate_report()["hub"].items()}

    before = held()
    chat = Chat(lambda name: Engine(file, Device.open()), "tiny", Sampling(), max_tokens=20)
    generation = chat.engine.generate([5, 6, 7, 8] * 5, 20, stop_ids=())
    assert len(list(generation)) == 20 and generation.stats.checks
    assert held()["buffers"] > before["buffers"]
    del generation
    chat.give_up()
    assert held() == before


def test_what_a_model_takes_is_said_before_it_is_taken(file: WeightsFile) -> None:
    said: list[tuple[int, Memory]] = []
    Engine(
        file,
        device := Device.open(),
        announce=lambda engine, memory: said.append((engine.device.allocated_bytes, memory)),
    )
    ((allocated, plan),) = said
    assert allocated == 0 and 0 < plan.total_bytes and device.allocated_bytes > 0
    both: list[Memory] = []
    Engine(file, Device.open(), draft=file, announce=lambda engine, memory: both.append(memory))
    assert both == [plan + plan]
