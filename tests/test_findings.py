"""What is printed of a record: every part in its order, nothing lost at any width, and nothing that is not in it."""

import copy
import io
import json
import re

import pytest
from test_report import curve, judged, one_test, record, result, with_tests

from tracing_jax.report.findings import MODEL_PARTS, SENTENCES, TITLES, findings, size_text
from tracing_jax.report.printed import print_summary, summary, summary_groups
from tracing_jax.report.terminal import WIDTH, plain_text, print_in_colour

_INDEPENDENT = "independent models: at most 8 of 128 units of a layer"


def full(word="related", **changes):
    """A record with something to say in every part."""
    effects = {"csu": "7 of 64 units are in place; by chance about one is", "match": f"3 of 64 agree; {_INDEPENDENT}"}
    found = {name: {"non_aligned": result(0.5, log10_p=-9.0, effect=effect, tests=[one_test()]), "aligned": None}
             for name, effect in effects.items()}  # fmt: skip
    found["match_io"] = {"non_aligned": result(0.25, log10_p=-8.0, effect=f"2 of 64 agree; {_INDEPENDENT}"),
                         "aligned": result(0.75)}  # fmt: skip
    path = curve(5) | {"midpoint": 7.0, "barrier": 5.0, "groups": ["mlp"]}
    found["mode"] = {"non_aligned": result(7.25, curve=path), "aligned": None}
    found["glu"] = {"non_aligned": result(not_applicable="the MLP has no gate"), "aligned": None}
    part = {"verdict": word, "statistic": "csu", "statistics": ["csu", "match", "match_io"], "log10_p": -9.0}
    verdict = judged() | {
        "verdict": word, "meaning": f"meaning of {word}", "parts": {"MLPs": part | {"effect": None}},
        "explanations": ["one descends from the other"], "reservations": {"csu": "order alone is no evidence"},
        "blind_to": {"csu": ["permuted units"]}, "limits": {"csu": ["another width"]},
        "identical": {"equal": 3, "total": 40, "by_part": {}},
    }  # fmt: skip
    claim = {"claim": "same-as", "asserts": "a", "outcome": "contradicted", "because": "they differ", "not_said": "b"}
    shares = {"model": {"share": 0.625, "se": 0.011}, "other": {"share": 0.375, "se": 0.012}}
    parts = [{"name": name, "word": "part", "adjusted_log10_p": -20.0, "reason": None, **share}
             for name, share in shares.items()]  # fmt: skip
    merge = {"sentence": "merged of model and other", "parts": parts, "notes": ["a note on shares"]}
    by_part = {"head": {"parents": shares, "tested": False, "undefined": None},
               "norms": {"parents": shares, "tested": False, "undefined": "other equals model here"}}  # fmt: skip
    verdict["merged_of"] = {"sentence": merge["sentence"], "parents": shares, "by_part": by_part}
    base = record(
        statistics=found, merge=merge, verdict=verdict, identical=verdict["identical"], claim=claim, tokens=None
    )
    base["models"] = copy.deepcopy(base["models"])
    base["models"]["base"] |= {"format": "bfloat16 in safetensors", "bytes": 3 * 2**29}
    base["args"] = {"save": "runs/compare.p"}
    base["notes"] = ["one note", "memory: resident; much is free"]
    return base | changes


def words(text):
    return re.findall(r"[^\s]+", re.sub(r"\x1b\[[0-9;]*m", "", text))


@pytest.mark.parametrize("word", SENTENCES)
def test_every_verdict_has_its_sentence(word):
    (part,) = [part for part in findings(full(word)) if part.title == "Verdict"]
    lines = [row.cells for row in part.rows]
    assert lines[0][0].startswith("CLAIM CONTRADICTED  same-as: they differ")
    assert lines[1] == (f"{word.replace('_', ' ').upper()}  model and tuned",)
    assert lines[2] == (SENTENCES[word],)
    assert ("in detail", f"meaning of {word}") in lines
    assert len(set(SENTENCES.values())) == len(SENTENCES)
    assert all(sentence.endswith(".") and not re.search(r"[=^_]|p-value", sentence) for sentence in SENTENCES.values())


def test_the_sentences_are_those_of_the_verdicts_that_a_record_can_have():
    from importlib import resources

    schema = json.loads(resources.files("tracing_jax").joinpath("record-1.schema.json").read_text())
    assert set(SENTENCES) == set(schema["$defs"]["verdict"]["properties"]["verdict"]["enum"])


def test_parts_stand_in_their_order_and_say_what_was_compared():
    text = summary([full()])
    assert tuple(line for line in text.splitlines() if line in TITLES) == TITLES
    shown = " ".join(text.split())
    assert "base org/model, commit 0123456789abcdef" in shown
    assert "1,234,567 parameters, bfloat16 in safetensors, 1.5 GiB" in shown
    assert "SHA-256 abababababababab... model.safetensors" in shown
    assert "Identical tensors 3 of 40 Verdict" in shown
    assert "MLPs: related csu 7 of 64 units are in place; by chance about one is; p = 10^-9.0" in shown
    assert f"match 3 of 64 agree; {_INDEPENDENT}; p = 10^-9.0" in shown
    assert "match_io 2 of 64 agree; independent models: as for match; a number: 0.75 aligned; p = 10^-8.0" in shown
    assert "not part of the verdict mode a number: 7.25 non-aligned" in shown
    assert "Shares merged of model and other model p < 10^-12 part, share 0.625 ± 0.011 other p" in shown
    assert "head model 0.625 ± 0.011, other 0.375 ± 0.012 (estimated; its units were not tested)" in shown
    assert "norms other equals model here note a note on shares" in shown
    assert "perplexity base 7.389, ft 8.5" in shown
    assert "glu the MLP has no gate" in shown
    assert all(f"{part} no test that ran compares it" in shown for part in MODEL_PARTS if part != "MLPs")
    assert "Notes one note Files report runs/compare.html record runs/compare.json" in shown
    assert "memory: " not in text


def test_what_would_hide_a_relation_is_said_unless_all_tensors_are_identical():
    hidden = "csu does not detect permuted units, another width"
    for word in ("no_evidence", "related"):
        assert hidden in " ".join(summary([full(word)]).split())
    assert hidden not in " ".join(summary([full("identical")]).split())


def test_files_are_named_only_where_they_were_written():
    assert "Files" not in summary([full()], saved=False)
    assert "Files" not in summary([full(args={"save": None})])


def test_a_calibrated_p_value_is_bounded():
    changed = full()
    given = changed["statistics"]["csu"]["non_aligned"]
    given |= {"log10_p": -300.0, "tests": [one_test() | {"calibrated": True}]}
    assert "p < 10^-12" in summary([changed])
    assert "10^-300" not in summary([changed])


@pytest.mark.parametrize("width", [40, 80, 200])
def test_colour_loses_nothing_at_any_width(width, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    records = [full(), full("no_evidence")]
    file = io.StringIO()
    print_in_colour(summary_groups(records), file, width)
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines())) <= width
    assert sorted("".join(words(file.getvalue()))) == sorted("".join(words(summary(records))))


def test_plain_text_fits_its_columns_and_has_no_control_character():
    text = plain_text(summary_groups([full(), full("undecided")]))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.replace("\n", "").isprintable()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_colour_unless_it_is_refused_and_a_pipe_has_none(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = []
    for file in (Terminal(), io.StringIO()):
        print_summary([with_tests()], file)
        shown.append(file.getvalue())
    monkeypatch.setenv("NO_COLOR", "1")
    print_summary([with_tests()], file := Terminal())
    assert "\x1b[1;31mRELATED" in shown[0]
    assert shown[1] == summary([with_tests()]) + "\n"
    assert not re.search(r"\x1b\[[\d;]*3\dm", file.getvalue())


def test_numbers_that_are_printed_are_in_the_record():
    """Digits that the record lacks come from a number that was rounded or made readable, of these few kinds."""
    source = json.dumps(full())
    made = {"1.5", "10^-9.0", "10^-8.0", "10^-41.2", "0-2", "128", "8"}
    for number in re.findall(r"\d[\d.,^-]*\d|\d", summary([full()]).replace("SHA-256", "")):
        assert number.replace(",", "") in source or number in made or number.lstrip("10^-") in source, number


def test_sizes():
    assert [size_text(n) for n in (None, 0, 1536, 2**20 - 4096, 3 * 2**20, 7 * 2**30, 1500 * 2**30)] == [
        *("", "", "1.5 KiB", "1,020 KiB", "3 MiB", "7 GiB", "1,500 GiB")
    ]
