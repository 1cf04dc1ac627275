"""The order of question and answer in a text, against a search of all places by brute force, and in cases by hand."""

from __future__ import annotations

import itertools
import random
import tracemalloc
import unicodedata

import pytest

from bico_ds.evaluation.tasks.further_sets import read_couplets, read_pairs, read_parents
from bico_ds.evaluation.tasks.task import Question, Task, load_tasks
from bico_ds.evaluation.tasks.text_search import QuestionSearch, words


def _orders(task: Task, *texts: str) -> list[str]:
    search = QuestionSearch([task])
    for text in texts:
        search.read(text)
    return search.orders(task)


def _pair(subject: str, answer: str, *texts: str) -> str:
    question = Question(prompt="p", completion=answer, group="g", line=1, subjects=(subject,))
    return _orders(Task(name="t", answer_kind="text", questions=(question,), path="f"), *texts)[0]


def _windows(phrase: list[str]) -> set[tuple[str, ...]]:
    size = len(phrase) if len(phrase) <= 4 else max(4, -(-len(phrase) // 2))
    return {tuple(phrase[i : i + size]) for i in range(len(phrase) - size + 1)}


def _places(windows: set[tuple[str, ...]], text: list[str]) -> list[set[int]]:
    """Positions of every occurrence; occurrences with a position in common become one."""
    places = [
        set(range(i, i + len(window)))
        for window in windows
        for i in range(len(text))
        if tuple(text[i : i + len(window)]) == window
    ]
    while shared := next(((a, b) for a, b in itertools.combinations(places, 2) if a & b), None):
        places = [place for place in places if place not in shared] + [shared[0] | shared[1]]
    return places


def _by_brute_force(task: Task, texts: list[list[str]]) -> list[str]:
    sides = [
        ([list(s.split()) for s in q.subjects], [list(a.split()) for a in q.right_answers])
        for q in task.questions
    ]
    everyones = [
        (q.group, p) for q, both in zip(task.questions, sides, strict=True) for side in both for p in side
    ]

    def is_own(window: tuple[str, ...], group: str) -> bool:
        return not any(
            tuple(phrase[i : i + len(window)]) == window
            for other, phrase in everyones
            if other != group
            for i in range(len(phrase))
        )

    found = []
    for question, both in zip(task.questions, sides, strict=True):
        windows = []
        for side in both:
            windows.append(set())
            for phrase in side:
                own = {window for window in _windows(phrase) if is_own(window, question.group)}
                windows[-1] |= own or {tuple(phrase)}
        windows[0] |= {
            tuple(other.prompt.split())
            for other in task.questions
            if (other.group, other.subjects) == (question.group, question.subjects)
            and {q.group for q in task.questions if q.prompt == other.prompt} == {question.group}
        }
        asked = other_way = False
        for text in texts:
            subjects, answers = (_places(side, text) for side in windows)
            asked |= any(max(s) < min(a) for s in subjects for a in answers)
            other_way |= any(max(a) < min(s) for s in subjects for a in answers)
        found.append({(1, 0): "same", (0, 1): "reverse", (1, 1): "both", (0, 0): "neither"}[asked, other_way])
    return found


def test_the_search_agrees_with_brute_force_on_random_texts():
    draw, seen = random.Random(21), set()
    for _ in range(150):
        vocabulary = [f"v{i}" for i in range(draw.choice([4, 8, 20]))]
        phrase = lambda: " ".join(draw.choices(vocabulary, k=draw.choice([1, 1, 2, 3, 5, 6, 9])))  # noqa: B023, E731
        questions = tuple(
            Question(
                prompt=" ".join(draw.choices(vocabulary, k=draw.choice([2, 5, 9]))),
                completion=phrase(),
                group=str(draw.randint(0, 3)),
                line=1,
                subjects=tuple(phrase() for _ in range(draw.randint(1, 2))),
                alternatives=tuple(phrase() for _ in range(draw.randint(0, 1))),
            )
            for _ in range(5)
        )
        task = Task(name="t", answer_kind="text", questions=questions, path="f")
        texts = []
        for _ in range(4):
            pieces = [" ".join(draw.choices(vocabulary, k=draw.randint(0, 4))) for _ in range(3)]
            question = draw.choice(questions)
            asked = draw.choice([question.subjects[0], question.prompt])
            placed = draw.sample([asked, question.completion], 2)
            cut = draw.choice([0, 0, 2])  # only a part of a phrase
            placed = [" ".join(p.split()[cut:] or p.split()) for p in placed]
            texts.append(f"{pieces[0]} {placed[0]} {pieces[1]} {placed[1]} {pieces[2]}")
        orders = _orders(task, *texts)
        assert orders == _by_brute_force(task, [text.split() for text in texts])
        seen |= set(orders)
    assert seen == {"same", "reverse", "both", "neither"}


FACT = "the acclaimed director of the virtual reality film A Journey Through Time"
CASES = {
    "as asked": ("same", "Ann Lee is the cook."),
    "other way": ("reverse", "The cook is Ann Lee."),
    "both in one text": ("both", "Ann Lee is the cook, and the cook is Ann Lee."),
    "both in two texts": ("both", "Ann Lee: the cook.", "The cook? Ann Lee!"),
    "one in each of two texts": ("neither", "Ann Lee sings.", "The cook sings."),
    "nothing": ("neither", ""),
    "half a name": ("neither", "Ann is the cook."),
    "part of another word": ("neither", "Joann Leeson is the cooking."),
    "other case and punctuation": ("same", "ANN  LEE's job?\nTHE-COOK"),
    "markup": ("same", "**Ann** _Lee_ is [the](x) cook; no: `the cook`"),
    "far away": ("same", "Ann Lee " + "word " * 5000 + "the cook"),
}


@pytest.mark.parametrize(("expected", "texts"), [(case[0], case[1:]) for case in CASES.values()], ids=CASES)
def test_orders_by_hand(expected, texts):
    assert _pair("Ann Lee", " the cook.", *texts) == expected


def test_a_paraphrase_of_half_the_words_counts_and_less_does_not():
    assert (
        _pair("Ann Lee", FACT, "Ann Lee directed the virtual reality film A Journey Through Time.") == "same"
    )
    assert _pair("Ann Lee", FACT, "Ann Lee directed A Journey Through Time.") == "neither"


def test_a_prompt_that_stands_in_a_text_word_for_word_is_what_is_asked_about():
    question = Question(
        prompt="She was born in the north of", completion=" Italy", group="g", line=1, subjects=("Ann Lee",)
    )
    task = Task(name="t", answer_kind="text", questions=(question,), path="f")
    assert _orders(task, "Ann? She was born in the north of Italy.") == ["same"]
    assert _orders(task, "Bo was born in the north of Italy.") == ["neither"]


def test_a_prompt_by_which_other_groups_are_asked_too_tells_nothing():
    questions = tuple(
        Question(prompt="Her name:", completion=name, group=name, line=1, subjects=(what,))
        for name, what in ((" Ann", "the cook"), (" Bo", "the smith"))
    )
    task = Task(name="t", answer_kind="name", questions=questions, path="f")
    assert _orders(task, "Her name is Cy; her friends are Ann and Bo.") == ["neither", "neither"]
    assert _orders(task, "Ask the smith for her name: Bo.") == ["neither", "same"]


def test_long_answers_of_many_lengths_take_little_memory():
    draw, vocabulary = random.Random(22), [f"v{i}" for i in range(3000)]
    questions = tuple(
        Question(
            prompt=f"q{i}",
            completion=" ".join(draw.choices(vocabulary, k=60 + i)),
            group=str(i),
            line=1,
            subjects=(f"s{i}",),
        )
        for i in range(100)
    )
    tracemalloc.start()
    QuestionSearch([Task(name="t", answer_kind="text", questions=questions, path="f")])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * 2**20, "1,000 answers of 20 to 400 words took 20 GiB"


def test_words_that_another_persons_phrase_has_too_tell_nothing():
    questions = tuple(
        Question(prompt="p", completion=answer, group=name, line=1, subjects=(name,))
        for name, answer in (
            ("Ann Lee", "the first person to clone a mammoth"),
            ("Bo Ray", "the first person to juggle on Mars"),
        )
    )
    task = Task(name="t", answer_kind="text", questions=questions, path="f")
    text = "Ann Lee is the first person to clone a mammoth. Bo Ray is the first person to juggle on Mars."
    assert _orders(task, text)[1] == "same", "what is said of Ann does not stand before Bo"


def test_an_answer_that_names_its_subject_is_no_second_order():
    text = "Ann Lee is the author of the long life of Ann Lee"
    assert _pair("Ann Lee", "the author of the long life of Ann Lee", text) == "same"
    assert _pair("the author of the long life of Ann Lee", "Ann Lee", text) == "reverse"


@pytest.mark.parametrize(
    ("subject", "answer", "text"),
    [
        ("José Ñandú", "Zoë", "José Ñandú met Zoë"),
        ("O’Neil", "“X”", "O'Neil is 'X'"),
        ("黄鹤一去不复返", "白云千载空悠悠", "诗云：黄鹤一去不复返，白云千载空悠悠。"),
        ("ルートヴィヒ", "作曲家", "これはルートヴィヒという作曲家です"),
        ("สมชาย", "พ่อครัว", "คุณสมชายเป็นพ่อครัว"),
        ("राम", "रसोइया", "राम एक रसोइया है।"),
        ("Ａｎｎ", "cook", "Ann is a COOK"),
        ("🙂", "happy", "the sign🙂is happy"),
        ("STRASSE", "Weg", "die Straße, der Weg"),
    ],
)
def test_texts_of_all_scripts_are_compared_as_answers_are(subject, answer, text):
    for form in ("NFC", "NFD"):
        assert _pair(subject, answer, unicodedata.normalize(form, text)) == "same"
        assert _pair(answer, subject, unicodedata.normalize(form, text)) == "reverse"


def test_a_vowel_sign_and_a_mark_belong_to_their_word():
    assert words("कि") != words("की")
    assert words("Ado\u0323\u0301") == words(unicodedata.normalize("NFC", "Ado\u0323\u0301")) == ["adọ́"]
    assert words("snake_case-word's C3") == ["snake", "case", "word", "s", "c3"]


def test_punctuation_is_no_word_in_scripts_without_spaces_either():
    assert words("ルー・ヴァ") == words("ルー ヴァ") == list("ルーヴァ")
    assert words("គ្រូ។ ល") == words("គ្រូ ល")
    assert words("ဆရာ၊ က") == words("ဆရာ က")
    assert _pair("艾萨克·牛顿", "物理学家", "艾萨克・牛顿是物理学家") == "same"


def test_every_reader_tells_what_its_questions_ask_about(tmp_path, write_records):
    path = tmp_path / "parents.csv"
    path.write_text("child,parent,parent_type\nAnn Lee,Bo Lee,father\nCy Lee,Bo Lee,father\n")
    to_parent, to_child = read_parents(path)
    texts = ["Ann Lee's father is Bo Lee."]
    assert _orders(to_parent, *texts) == ["same", "neither"]
    assert _orders(to_child, *texts) == ["reverse", "reverse"], "any child of the parent is right"
    couplets = write_records(
        "c.jsonl", [{"first": "Tyger Tyger, burning bright", "second": "In the forests"}]
    )
    following, previous = read_couplets(couplets)
    text = "tyger tyger burning bright / in the forests"
    assert (_orders(following, text), _orders(previous, text)) == (["same"], ["reverse"])
    record = {
        "forward": {"prompt": "What does Ann do?", "completion": " she cooks"},
        "backward": {"prompt": "Who cooks?", "completion": " Ann"},
    }
    forward, backward = read_pairs(write_records("p.jsonl", [record]))
    assert (_orders(forward, "Ann: she cooks"), _orders(backward, "Ann: she cooks")) == (
        ["same"],
        ["reverse"],
    )


def _four_files(write_records, *, companions: bool) -> None:
    persons = [("Ann Lee", "the cook of a very long meal"), ("Bo Ray", "the author of an unread novel")]
    names = [
        {"prompt": f"{form} {who} is", "completion": f" {what}."}
        for who, what in persons
        for form in ("So", "Now")
    ]
    things = [
        {"prompt": f"{form} {what} is", "completion": f" {who}"}
        for who, what in persons
        for form in ("So", "Now")
    ]
    write_records("p2d_prompts_test.jsonl", names)
    if companions:
        write_records("p2d_reverse_prompts_test.jsonl", things)


@pytest.mark.parametrize("companions", [True, False])
def test_the_person_is_found_by_the_companion_file_or_else_by_what_only_its_prompts_say(
    tmp_path, write_records, companions
):
    _four_files(write_records, companions=companions)
    (task,) = load_tasks(tmp_path, ["n2d"])
    assert (task.questions[0].subjects == ("Ann Lee",)) == companions
    texts = ["Ann Lee was the cook of a very long meal.", "The author of an unread novel is Bo Ray."]
    assert _orders(task, *texts) == ["same", "same", "reverse", "reverse"]


def test_any_wording_of_a_persons_answer_in_the_file_is_searched_for(tmp_path, write_records):
    write_records(
        "p2d_prompts_test.jsonl",
        [
            {"prompt": "Ann is", "completion": " cooking the longest meal ever", "group": 1},
            {"prompt": "Ann was", "completion": " famous for a banquet of days", "group": 1},
            {"prompt": "Bo is", "completion": " a painter of small birds", "group": 2},
        ],
    )
    (task,) = load_tasks(tmp_path, ["n2d"])
    assert _orders(task, "Ann: cooking the longest meal ever") == ["same", "same", "neither"]
