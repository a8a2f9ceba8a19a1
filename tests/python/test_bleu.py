"""Corpus BLEU of the programs against sacreBLEU, through the small bleu_tool executable."""

import logging
import os
import pathlib
import subprocess

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = os.environ.get("REMNANT_BUILD")
TOOL = pathlib.Path(BUILD or ROOT / "build") / "tests" / "bleu_tool"

# A build that was named must hold the tool: skipping would pass for a comparison that never ran.
if not TOOL.exists() and BUILD is None:
    pytest.skip(f"{TOOL} is not built: run ./dev build", allow_module_level=True)

# It warns about text that looks tokenized, which is the point of some of these.
logging.getLogger("sacrebleu").setLevel(logging.ERROR)

CASES = [(tokenizer, lowercase) for tokenizer in ("none", "13a") for lowercase in (False, True)]


def ours(folder, hypotheses, references, tokenizer, lowercase):
    paths = []
    for name, lines in (("hypotheses", hypotheses), ("references", references)):
        paths.append(folder / name)
        paths[-1].write_bytes("".join(line + "\n" for line in lines).encode())
    case = "lc" if lowercase else "mixed"
    output = subprocess.run(
        [TOOL, *paths, tokenizer, case], check=True, capture_output=True, text=True
    ).stdout
    score, signature = output.split()
    return float(score), signature


def compare(folder, hypotheses, references, tokenizer, lowercase):
    metric = sacrebleu.BLEU(tokenize=tokenizer, lowercase=lowercase)
    expected = metric.corpus_score(hypotheses, [references]).score
    theirs = str(metric.get_signature()).partition("|version:")[0]
    score, signature = ours(folder, hypotheses, references, tokenizer, lowercase)
    assert score == pytest.approx(expected, rel=0, abs=1e-6)  # the tool prints six decimals
    assert signature == "BLEU|" + theirs
    return score


# Scripts with capitals, every kind of space, and the characters that the rules name; up to a code
# point that every supported Python's Unicode tables know.
CHARACTERS = st.one_of(
    st.sampled_from("aAbBzZ019.,-'\"&;:!?()[]{}<>/\\_#$%@*+=^`|~ \t\r\v\f"),
    st.sampled_from("äÄßẞéÉñœŒİıΣσςЖж–—„“”’…€«»¿\u00a0\u0085\u1680\u2003\u2028\u202f\u3000\u200b\u00ad\x1c\x1f"),
    st.characters(min_codepoint=1, max_codepoint=0x24FF, blacklist_characters="\n", blacklist_categories=("Cn",)),
    st.sampled_from("中文字，。😀👩"),
)
PIECES = st.one_of(
    st.sampled_from(
        "a the man man's woman dog Two two-story T-shirt 1,000 3.14 5-year-old 50% U.S. a.m. e.g., &amp; &lt;b&gt; "
        "&quot;hi&quot; &amp;lt; &apos; <skipped> ... -- . , ! ? über Straße Männer „Café“ don't 10-12 .5 5. ,,, -"
        .split()
    ),
    st.text(CHARACTERS, max_size=6),
)


@st.composite
def sentence_pairs(draw):
    """A reference and something a translator might make of it: words changed, dropped, added, cut off."""
    reference = draw(st.lists(PIECES, max_size=14))
    hypothesis = []
    for piece in reference:
        kind = draw(st.integers(0, 9))
        if kind == 0:
            continue
        hypothesis.append(draw(PIECES) if kind == 1 else piece.upper() if kind == 2 else piece)
        if kind == 3:
            hypothesis.append(draw(PIECES))
    if draw(st.integers(0, 9)) == 0:
        hypothesis = hypothesis[:2]
    joint = draw(st.sampled_from([" ", " ", " ", ""]))
    return joint.join(hypothesis), " ".join(reference)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bleu")


@pytest.mark.parametrize("tokenizer, lowercase", CASES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pairs=st.lists(sentence_pairs(), min_size=1, max_size=6))
@example(pairs=[("", "a b c d")])
@example(pairs=[("", ""), ("a b c d", "a b c d")])
@example(pairs=[("a b", "a b c d e")])
@example(pairs=[("A man.", "a man .")])
@example(pairs=[("x  ", "x"), ("a man rides a bike-", "A man rides a bike- ")])
def test_random_text(folder, tokenizer, lowercase, pairs):
    hypotheses, references = zip(*pairs)
    compare(folder, list(hypotheses), list(references), tokenizer, lowercase)


REFERENCES = [
    'A man in an orange hat starring at something.',
    'A Boston Terrier is running on lush green grass in front of a white fence.',
    "A man's T-shirt says \"R&B\" (in 3-inch, 1,000-dollar letters).",
    'Five people wearing winter jackets and helmets stand in the snow, with snowmobiles in the background.',
    'Ein kleines Mädchen klettert in ein „Spielhaus“ aus Holz – im Freien.',
    'Obst- und Gemüsestand, 3.50 € pro Kilo; geöffnet von 8-12 Uhr!',
    'Two people sit at a table.',
]
HYPOTHESES = [
    'a man in an orange hat staring at something .',
    'a boston terrier runs on lush green grass in front of a white fence .',
    'A man\'s T-shirt says &quot;R&amp;B&quot; (in 3-inch, 1,000-dollar letters).',
    'five people in winter jackets and helmets stand in the snow, with snowmobiles in the background.',
    'Ein kleines Mädchen klettert in ein „Spielhaus“ aus Holz – im Freien .',
    'Obst - und Gemüsestand, 3.50 € pro Kilo; geöffnet von 8-12 Uhr !',
    '',
]


@pytest.mark.parametrize("tokenizer, lowercase", CASES)
def test_captions(folder, tokenizer, lowercase):
    score = compare(folder, HYPOTHESES, REFERENCES, tokenizer, lowercase)
    assert 20 < score < 95


@pytest.mark.parametrize("tokenizer, lowercase", CASES)
def test_each_caption_alone(folder, tokenizer, lowercase):
    for hypothesis, reference in zip(HYPOTHESES, REFERENCES):
        compare(folder, [hypothesis], [reference], tokenizer, lowercase)


def test_unequal_sizes_fail(folder):
    with pytest.raises(subprocess.CalledProcessError) as failure:
        ours(folder, ["a", "b"], ["a"], "none", False)
    assert "2 hypotheses and 1 references" in failure.value.stderr
