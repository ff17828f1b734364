import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from receptance.engine.offline import Results, parse_line, read_lines
from receptance.engine.params import SamplingParams
from receptance.engine.request import Grammar, Request, Score
from receptance.errors import ConfigError

# float32 is batch-invariant: what runs together decides nothing
COMMAND = [sys.executable, "-m", "receptance", "batch", "--quiet", "--dtype", "float32"]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def answers(path: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {answer["id"]: answer for answer in found}
    assert len(by_id) == len(found)  # none twice
    return by_id


def stories(path: Path, count: int) -> Path:
    return write(path, [{"prompt": f"Story {i}: Once", "max_tokens": 30, "ignore_eos": True} for i in range(count)])


def test_a_line_says_what_is_asked() -> None:
    defaults = SamplingParams(seed=10, temperature=0.5)
    line = parse_line(3, '{"prompt": "Hi", "top_p": 0.5, "n": 2, "logit_bias": {"5": -1}, "json_schema": {}}', defaults)
    assert isinstance(line.asked, Request)
    assert (line.id, line.asked.prompt, line.asked.n, line.asked.grammar) == ("3", "Hi", 2, Grammar(json_schema="{}"))
    assert line.asked.params == SamplingParams(seed=13, temperature=0.5, top_p=0.5, logit_bias={5: -1})
    score = parse_line(0, '{"id": "x", "context": [1, 2], "continuation": "b"}', defaults)
    assert isinstance(score.asked, Score)
    assert (score.id, score.asked.context, score.asked.continuation) == ("x", [1, 2], "b")
    assert parse_line(0, '{"embed": "text"}', defaults).asked == "text"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{oops", "not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"prompt": "x", "temprature": 1}', "unknown fields temprature"),
        ('{"prompt": 5}', "prompt is 5"),
        ('{"prompt": "x", "embed": "y"}', "prompt and embed"),
        ('{"max_tokens": 5}', "found none"),
        ('{"prompt": "x", "top_p": 7}', "top_p is 7"),
        ('{"prompt": "x", "logit_bias": {"a": 1}}', "no token ids"),
        ('{"prompt": "x", "regex": "a", "lark": "b"}', "expected one of"),
        ('{"context": "x"}', "continuation is None"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(text: str, says: str) -> None:
    line = parse_line(6, text, SamplingParams())
    assert isinstance(line.asked, ConfigError)
    assert "line 7" in str(line.asked)
    assert says in str(line.asked)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ConfigError, match="UTF-8"):
        list(read_lines(path, SamplingParams(), set()))


def test_a_torn_last_answer_is_cut_off_and_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b'{"id": "a", "text": "x"}\n{"id": "b", "te')
    results = Results(path)
    assert results.done == {"a"}
    results.write({"id": "b", "text": "y"})
    results.close()
    assert path.read_bytes() == b'{"id": "a", "text": "x"}\n{"id": "b", "text": "y"}\n'


def test_a_file_of_something_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("precious\nnotes")
    with pytest.raises(ConfigError, match="line 1 is no answer"):
        Results(path)
    assert path.read_text() == "precious\nnotes"


def test_every_kind_of_line_is_answered(tmp_path: Path) -> None:
    asked = [
        {"id": "story", "prompt": "Once", "max_tokens": 4, "temperature": 0, "logprobs": 1},
        {"id": "two", "prompt": "Once", "max_tokens": 3, "n": 2},
        {"id": "score", "context": "Once upon a", "continuation": " time"},
        {"id": "vector", "embed": "A dog"},
        {"id": "bad", "prompt": [10**9]},
        "nonsense",
    ]
    source, target = write(tmp_path / "in", asked), tmp_path / "out"
    done = subprocess.run([*COMMAND, source, target, "--seed", "1"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "2 of 6 lines" in done.stderr
    found = answers(target)
    assert found["story"]["finish_reason"] == "length"
    assert len(found["story"]["logprobs"]) == 4
    assert [x["seed"] for x in found["two"]["texts"]] == [2, 3]
    assert -1 < found["score"]["logprob"] < 0
    assert found["score"]["greedy"]
    assert len(found["vector"]["embedding"]) == 256
    assert "token id 1000000000" in found["bad"]["error"]
    assert "line 6" in found["5"]["error"]


def test_killed_and_run_again_it_answers_each_line_once(tmp_path: Path) -> None:
    source, whole, target = stories(tmp_path / "in", 150), tmp_path / "whole", tmp_path / "out"
    subprocess.run([*COMMAND, source, whole, "--seed", "5"], check=True)
    for kill_at in (5, 60):
        process = subprocess.Popen([*COMMAND, source, target, "--seed", "5", "--slots", "8"])
        while process.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") < kill_at):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(target.read_bytes()) < len(whole.read_bytes())
    subprocess.run([*COMMAND, source, target, "--seed", "5"], check=True)
    assert answers(target) == answers(whole)


def test_several_processes_give_the_same_answers(tmp_path: Path) -> None:
    source, alone, shared = stories(tmp_path / "in", 30), tmp_path / "alone", tmp_path / "shared"
    subprocess.run([*COMMAND, source, alone, "--seed", "5"], check=True)
    subprocess.run([*COMMAND, source, shared, "--seed", "5", "--workers", "2", "--threads", "1"], check=True)
    assert answers(alone) == answers(shared)


def test_in_and_out_must_differ(tmp_path: Path) -> None:
    source = stories(tmp_path / "in", 1)
    done = subprocess.run([*COMMAND, source, source], capture_output=True, text=True)
    assert done.returncode == 2
    assert "same file" in done.stderr
