"""`adapter tune`: with a real scoring command, and with those that fail, hang and lie."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import adapterhub_lite as ah
from adapterhub_lite.scoring import Command

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done, Handmade

    Run = Callable[..., Done]

SITE = "net.layers.0.q"
# The squared distance of ΔW at one layer from a target, with nothing but Python; all-float32 LoRAs with alpha = r.
DISTANCE = """
import array, json, math, struct, sys

def factors(folder):
    data = open(folder + "/adapter_model.safetensors", "rb").read()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    scale = json.load(open(folder + "/adapter_config.json"))
    for name in "AB":
        own = header[f"base_model.model.net.layers.0.q.lora_{name}.weight"]
        assert own["dtype"] == "F32"
        begin, end = own["data_offsets"]
        yield own["shape"], array.array("f", data[8 + size + begin : 8 + size + end])
    yield scale["lora_alpha"] / scale["r"]

def delta(folder):
    ((r, wide), a), ((high, _), b), s = factors(folder)
    return [s * sum(b[i * r + k] * a[k * wide + j] for k in range(r)) for i in range(high) for j in range(wide)]

trial, target = delta(sys.argv[1]), delta(sys.argv[2])
print("distance:")
print(sum((x - y) ** 2 for x, y in zip(trial, target)))
print()
"""
PYTHON = shlex.join([sys.executable, "-S", "-E"])


def py(code: str, *words: str) -> str:
    """A command that runs this code."""
    return f"{PYTHON} -c {shlex.quote(code)} {' '.join(words or ('{adapter}',))}"


@pytest.fixture
def ab(handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    for seed, name in enumerate("ab"):
        handmade(tmp_path / name, {SITE: 2, "net.layers.1.k": 3}, seed=seed)
    (tmp_path / "distance.py").write_text(DISTANCE)
    return tmp_path


def test_a_scoring_command_finds_what_a_target_was_made_of(adapter: Run, ab: Path) -> None:
    assert adapter("merge", "a", "b", "-w", 0.6, -0.3, "-o", "target").code == 0
    command = f"{PYTHON} distance.py {{adapter}} target"
    words = ["tune", "a", "b", "--score", command, "--minimize", "--l1", 0, "--trials", 60, "--log", "log.jsonl"]
    done = adapter(*words, "-o", "out", "--json")
    assert done.code == 0, done.err
    weights = [own["weight"] for own in done.json["adapters"]]
    assert weights == pytest.approx([0.6, -0.3], abs=0.1)
    assert done.json["score"] == min(trial["score"] for trial in done.json["trials"])
    assert done.json["score"] < 0.02 * done.json["trials"][0]["score"]
    assert len((ab / "log.jsonl").read_text().splitlines()) == 1 + len(done.json["trials"])
    assert not list((ab / "tmp").iterdir())
    # What was written is that merge; it tells how it was found, and can be made again.
    assert adapter("info", "out").out.splitlines()[-2:] == [
        f"made by     {weights[0]} * a + {weights[1]} * b",
        f"weights by  a search of 60 trials with seed 0: score {done.json['score']:g} of {command}",
    ]
    assert adapter("reproduce", "out").out == "reproduced out: every bit is the same\n"
    assert adapter("verify", "out").code == 0
    # The log is enough: nothing is scored again, and the bytes are the same.
    (ab / "distance.py").unlink()
    again = adapter(*words, "--resume", "-o", "again")
    assert again.code == 0, again.err
    assert again.out.startswith(f"the best of 60 trials: {weights[0]:.6f}".rstrip("0"))
    for file in (ab / "out").iterdir():
        assert (ab / "again" / file.name).read_bytes() == file.read_bytes()


def test_rules_have_their_own_weights(adapter: Run, ab: Path) -> None:
    """Shares are within 0 and 1, and nothing counts against them; each trial is truncated as the result is."""
    score = py("import json, sys; print(json.load(open(sys.argv[1] + '/adapter_config.json'))['r'])")
    words = ["tune", "a", "b", "--score", score, "--rule", "ties", "--density", 0.5, "--trials", 5, "--json"]
    done = adapter(*words, "--rank", 2, "-o", "out")
    assert done.code == 0, done.err
    assert {trial["score"] for trial in done.json["trials"]} == {2.0}
    assert all(0 <= w <= 1 for trial in done.json["trials"] for w in trial["weights"])
    assert done.json["trials"][0]["weights"] == [0.5, 0.5]
    recipe = ah.load("out").single.own.facts["recipe"]  # type: ignore[union-attr]
    assert recipe["search"]["l1"] == 0
    assert recipe["terms"][0]["of"]["terms"][0]["options"]["density"] == 0.5
    assert adapter("reproduce", "out").code == 0
    adapter(*words, "-o", "whole").refused("has full rank", "--rank N")
    assert "a seed of the rule" not in adapter(*words[:6], "dare_linear", "--help").out
    assert "--rule-seed" in adapter("tune", "--rule", "dare_linear", "--help").out


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('accuracy: 0.9')", ["printed 'accuracy: 0.9' last", "no finite number"]),
        ("print(1); print('nan')", ["printed 'nan' last"]),
        ("pass", ["printed nothing"]),
        ("import sys; print(0.5); sys.exit('no data')", ["exited with 1 (no data)", "trial 1, weights 0.5 0.5"]),
        ("import os; os.kill(os.getpid(), 9)", ["was ended by signal 9"]),
        ("print('x' * 5000 + chr(27))", ["xxx…'"]),
    ],
)
def test_a_command_without_a_score_ends_it(adapter: Run, ab: Path, code: str, words: list[str]) -> None:
    done = adapter("tune", "a", "b", "--score", py(code), "-o", "out")
    done.refused(*words)
    assert sorted(path.name for path in ab.iterdir()) == ["a", "b", "distance.py", "tmp"]
    assert not list((ab / "tmp").iterdir())


def test_a_command_that_hangs_is_ended_with_what_it_started(adapter: Run, ab: Path) -> None:
    code = "import subprocess; child = subprocess.Popen(['sleep', '60'])\n"
    code += "open('pid', 'w').write(str(child.pid)); child.wait()"
    done = adapter("tune", "a", "b", "--score", py(code), "--timeout", 1, "--log", "log", "-o", "out")
    done.refused("was not done after 1 s", "--timeout")
    until = time.monotonic() + 10
    while alive(int((ab / "pid").read_text())) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(int((ab / "pid").read_text()))
    assert not (ab / "out").exists()
    assert len((ab / "log").read_text().splitlines()) == 1


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupt_leaves_the_log_and_no_output(adapter: Run, ab: Path) -> None:
    code = "import os, pathlib, signal, time; file = pathlib.Path('n'); file.touch(); n = file.stat().st_size\n"
    code += (
        f"file.write_text('x' * (n + 1)); n == 3 and (os.kill({os.getpid()}, signal.SIGINT), time.sleep(60)); print(n)"
    )
    words = ["tune", "a", "b", "--score", py(code), "--trials", 5, "--log", "log", "-o", "out"]
    done = adapter(*words)
    assert done.code == 130
    assert done.err.startswith("adapter: interrupted; the best of 3 trials was ")
    assert "; --resume goes on with log" in done.err
    assert not (ab / "out").exists()
    assert not list((ab / "tmp").iterdir())
    assert adapter(*words, "--resume", "-q").out == ""
    assert len((ab / "n").read_text()) == 6  # three before, one in vain, two after
    assert [json.loads(line)["score"] for line in (ab / "log").read_text().splitlines()[1:]] == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--score", "python eval.py"], "does not say where the adapter's folder goes"),
        (["--score", "python 'eval.py {adapter}"], "cannot be split"),
        (["--score", "true {adapter}", "--resume"], "give --log FILE"),
        (["--score", "true {adapter}", "--start", "1"], "1 weights to start with for 2 adapters"),
        (["--score", "true {adapter}", "--rule", "sce", "--rank", 1], "finds its own weights"),
        (["--score", "true {adapter}", "--rank", 1, "--budget", "1kB"], "exclude each other"),
        (["--score", "true {adapter}", "--bounds", "-1", "nought"], "not a valid float"),
        ([], "--score"),
    ],
)
def test_wrong_usage(adapter: Run, ab: Path, words: list[object], said: str) -> None:
    done = adapter("tune", "a", "b", "-o", "out", *words)
    assert done.code == 2
    assert said in " ".join(done.err.split())


def test_what_can_be_refused_is_refused_before_the_first_trial(adapter: Run, ab: Path) -> None:
    touch = ["tune", "a", "b", "--score", "touch scored-{adapter}", "-o"]
    adapter(*touch, "a").refused("the output exists")
    adapter(*touch, "tmp", "--force").refused("does not look like an output of ours")
    adapter(*touch, "out", "--start", -2, 0).refused("begin at -2, which is not within -1.5 and 1.5")
    adapter(*touch, "out", "--bounds", 1, -1).refused("hold no interval")
    adapter(*touch, "out", "--log", "no/log").refused("no/log")
    adapter("tune", "a", "b", "--score", "no-such-program {adapter}", "-o", "out").refused("no-such-program")
    assert not list(ab.glob("scored-*"))


def test_words_are_those_of_a_shell_without_its_magic() -> None:
    command = Command("""python "my eval.py" --lora={adapter}/x '$HOME' * | tail""")
    assert command.words("/t m/p") == ["python", "my eval.py", "--lora=/t m/p/x", "$HOME", "*", "|", "tail"]
