"""Texts that are only written differently are scored alike; texts that differ are not."""

from __future__ import annotations

import random
import sys
import unicodedata

import pytest
from sacrebleu.metrics.bleu import BLEU

from bico_ds.common.errors import UserError
from bico_ds.evaluation.scoring.metrics import bleu, char_bleu, contains, exact, prefix, wrong_answers
from bico_ds.evaluation.tasks.further_sets import linked_groups, read_pairs, read_parents
from bico_ds.evaluation.tasks.task import Question, Task, load_tasks

COMPARE = (contains, prefix, exact)
LETTERS = [c for c in map(chr, range(0xA0, 0x3100)) if unicodedata.category(c) in {"Ll", "Lu", "Lo"}]
LETTERS += [chr(c) for c in range(0xAC00, 0xD7A4, 29)]
# Without the iota subscript, which becomes a letter in capitals.
MARKS = [c for c in map(chr, range(0x300, 0x370)) if unicodedata.combining(c) and c != "\u0345"]


def _random_text(draw: random.Random) -> str:
    """Letters of many scripts, each with up to three marks in any order, in words."""
    words = [
        "".join(
            draw.choice(LETTERS) + "".join(draw.sample(MARKS, draw.randint(0, 3)))
            for _ in range(draw.randint(1, 5))
        )
        for _ in range(draw.randint(1, 4))
    ]
    return " ".join(words)


def test_however_unicode_stores_a_text_it_is_the_same_text():
    draw = random.Random(11)
    for _ in range(300):
        text = _random_text(draw)
        forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
        for prediction in forms:
            for answer in forms:
                assert {compare(prediction, answer) for compare in COMPARE} == {1.0}, text
                assert contains(f"so {prediction} it is", answer) == 1.0, text
                assert bleu(prediction, answer) == bleu(answer, answer)
                assert char_bleu(prediction, answer) == char_bleu(answer, answer)


def test_a_missing_mark_is_another_letter_whether_or_not_both_are_one_character():
    draw = random.Random(12)
    for _ in range(300):
        base, mark = draw.choice("aeiounxq"), draw.choice(MARKS)
        with_mark = f"Jos{base}{mark}"
        if unicodedata.normalize("NFC", with_mark) == unicodedata.normalize("NFC", f"Jos{base}"):
            continue
        for form in ("NFC", "NFD"):
            stored = unicodedata.normalize(form, with_mark)
            scores = [compare(stored, f"Jos{base}") for compare in COMPARE]
            assert scores == [0.0, 0.0, 0.0], (base, mark)
            assert exact(f"Jos{base}", stored) == contains(f"Jos{base}", stored) == 0.0


def _as_before(text: str) -> str:
    """How version 0.1.0 compared texts."""
    return " ".join(text.split()).rstrip(". ").casefold()


def test_ascii_is_scored_as_it_always_was():
    draw, alphabet = random.Random(13), [*map(chr, range(32, 128)), *" " * 30, *"..\n\0"]
    oracle = BLEU(effective_order=True)
    for _ in range(2000):
        prediction, answer = ("".join(draw.choices(alphabet, k=draw.randint(1, 9))) for _ in range(2))
        prediction = draw.choice([prediction, f"{answer}{prediction}", f"{prediction} {answer.upper()} . "])
        before = _as_before(prediction), _as_before(answer)
        assert contains(prediction, answer) == float(before[1] in before[0])
        assert prefix(prediction, answer) == float(before[0].startswith(before[1]))
        assert exact(prediction, answer) == float(before[0] == before[1])
        assert (
            bleu(prediction, answer)
            == oracle.sentence_score(prediction.strip(), [answer.strip()]).score / 100.0
        )


SAME = {
    "apostrophe": ("O’Neil", "O'Neil"),
    "okina": ("Hawaiʻi", "Hawai'i"),
    "quotation marks": ("“A Journey”", '"A Journey"'),
    "German quotation marks": ("„Reise“", '"Reise"'),
    "guillemets": ("«Voyage»", '"Voyage"'),
    "heavy quotation marks": ("❝Ann❞", '"Ann"'),
    "Japanese double prime quotation marks": ("〝Ann〟", '"Ann"'),
    "reversed prime": ("\u2035Ann\u2032", "'Ann'"),
    "geresh": ("צ׳רלי", "צ'רלי"),
    "gershayim": ("צה״ל", 'צה"ל'),
    "Armenian apostrophe": ("Դ՚Արտանյան", "Դ'Արտանյան"),
    "two-em dash": ("Ann⸺Lee", "Ann-Lee"),
    "en dash": ("1990–1995", "1990-1995"),
    "no-break hyphen": ("X\u2011ray", "X-ray"),
    "no-break space": ("Ann\u00a0Lee", "Ann Lee"),
    "ideographic space": ("Ann\u3000Lee", "Ann Lee"),
    "full width": ("Ａｎｎ１２！", "Ann12!"),
    "full-width letter with a mark": ("Ｊｏｓｅ\u0301", "José"),
    "half-width kana": ("ｶﾞｲﾄﾞ", "ガイド"),
    "full stop of China": ("北京。", "北京"),
    "full-width full stop": ("Ann．", "Ann"),
    "ellipsis": ("Ann…", "Ann"),
    "danda": ("राम।", "राम"),
    "double danda": ("राम॥", "राम"),
    "full stop of Burma": ("ဆရာ။", "ဆရာ"),
    "full stop of Cambodia": ("គ្រូ។", "គ្រូ"),
    "full stop of Tibet": ("བླ་མ།", "བླ་མ"),
    "soft hyphen": ("Jo\u00adsé", "José"),
    "zero-width space": ("Ann\u200bLee", "AnnLee"),
    "byte-order mark": ("\ufeffAnn", "Ann"),
    "directional marks": ("\u202bمرحبا\u202c", "مرحبا"),
    "Arabic letters by position": ("ﻣﺮﺣﺒﺎ", "مرحبا"),
    "variation selector": ("❤\ufe0f", "❤"),
    "Hangul by letters": ("\u1112\u1161\u11ab", "한"),
    "Vietnamese, marks in the other order": ("Vie\u0302\u0323t", "Việt"),
    "Angstrom sign": ("\u212bngström", "Ångström"),
    "sharp s": ("STRASSE", "straße"),
    "final sigma": ("ΣΊΣΥΦΟΣ", "Σίσυφος"),
    "ligature": ("ﬁre", "fire"),
    "capitals with marks": ("JOSÉ ÑANDÚ", "josé ñandú"),
    "iota subscript": ("\u1fb3", "\u0391\u0399"),
}
DIFFERENT = {
    "mark": ("Jose", "José"),
    "dotless i": ("ısı", "isi"),
    "dotted capital I": ("İstanbul", "Istanbul"),
    "superscript": ("m²", "m2"),
    "fraction": ("½", "1/2"),
    "Roman numeral": ("Ⅳ", "IV"),
    "Cyrillic a": ("Аnn", "Ann"),
    "Hangul with and without a final": ("가", "각"),
    "vowel sign": ("कि", "की"),
    "corner brackets": ("「歌」", '"歌"'),
}


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME)
def test_another_way_to_write_the_same_text_is_right(one, other):
    for prediction, answer in ((one, other), (other, one)):
        assert {compare(prediction, answer) for compare in COMPARE} == {1.0}
        assert contains(f"it is {prediction}", answer) == 1.0


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_in_more_than_its_writing_is_wrong(one, other):
    assert exact(one, other) == exact(other, one) == 0.0


def test_every_character_has_one_form_only_and_upper_case_is_the_same():
    from bico_ds.evaluation.tasks.normalization import normalized

    codes = [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]
    for code in [*codes[:0x3400], *random.Random(14).sample(codes, 20_000)]:
        text = f"a{chr(code)}b"
        once = normalized(text)
        assert normalized(once) == once, hex(code)
        assert normalized(unicodedata.normalize("NFD", text)) == once, hex(code)
        if chr(code) != "ı":  # its capital is that of i
            assert normalized(text.upper()) == once, hex(code)


@pytest.mark.parametrize(
    "answer", [" \u200b", "\ufeff.", "。", "．", "…", "\u00ad", "\u3164", "\u2060 \u200f.", "\ufe0f"]
)
def test_an_answer_of_which_nothing_is_left_to_compare_is_refused(tmp_path, write_records, answer):
    records = [{"prompt": "q", "completion": " A"}, {"prompt": "q", "completion": answer}]
    write_records("d2p_prompts_test.jsonl", records)
    with pytest.raises(UserError, match=r"d2p_prompts_test.jsonl:2: the answer .* is nothing but full stops"):
        load_tasks(tmp_path, ["d2n"])
    question = Question(prompt="q", completion=" A", group="g", line=3, alternatives=(answer,))
    with pytest.raises(UserError, match=r"f:3: the answer .* is nothing but full stops"):
        Task(name="t", answer_kind="name", questions=(question,), path="f")


def test_half_a_character_is_refused_with_its_line(tmp_path):
    path = tmp_path / "d2p_prompts_test.jsonl"
    path.write_text('{"prompt": "q", "completion": " A"}\n{"prompt": "q \\ud83d", "completion": " B"}\n')
    with pytest.raises(UserError, match=r":2: field 'prompt' has a lone surrogate at character 3"):
        load_tasks(tmp_path, ["d2n"])


def _forms(text: str) -> tuple[str, str]:
    return unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)


def test_a_person_is_one_group_however_the_name_is_stored(tmp_path, write_records):
    composed, decomposed = _forms("José Ñandú")
    write_records(
        "p2d_reverse_prompts_test.jsonl",
        [{"prompt": "cook:", "completion": f" {name}."} for name in (composed, decomposed)],
    )
    write_records(
        "p2d_prompts_test.jsonl",
        [{"prompt": f"{name} is", "completion": " a cook of long meals."} for name in (composed, decomposed)],
    )
    for task in load_tasks(tmp_path, ["n2d", "n2d_reverse"]):
        assert {question.group for question in task.questions} == {composed}, task.name
    assert linked_groups([(composed, "x"), (decomposed, "y")]) == [0, 0]


def test_a_right_answer_in_another_form_is_never_offered_as_a_wrong_one(tmp_path, write_records):
    composed, decomposed = _forms("Zoë")
    questions = [
        Question(prompt="p", completion=f" {name}", group=group, line=line)
        for line, (name, group) in enumerate([(composed, "a"), (decomposed, "b"), ("Ann", "c")], start=1)
    ]
    task = Task(name="t", answer_kind="name", questions=tuple(questions), path="t.jsonl")
    assert wrong_answers(task, 9) == [[" Ann"], [" Ann"], [f" {composed}"]]
    pair = lambda name: {  # noqa: E731
        "forward": {"prompt": "q", "completion": f" {name}"},
        "backward": {"prompt": f"{name} is", "completion": f" {len(name)}"},
    }
    for task in read_pairs(write_records("pairs.jsonl", [pair(composed), pair(decomposed)])):
        assert len({question.group for question in task.questions}) == 1


def test_every_child_of_a_parent_is_right_in_whatever_form_its_name_is_stored(tmp_path):
    composed, decomposed = _forms("Núñez")
    path = tmp_path / "parents.csv"
    path.write_text(
        f"child,parent,parent_type\nAnn,{composed},father\nBo,{decomposed},father\n", encoding="utf-8"
    )
    _, to_child = read_parents(path)
    assert to_child.questions[0].right_answers == (" Ann", " Bo")
