"""Result files keep the names of version 0.1.0, whatever the code calls their parts."""

from __future__ import annotations

import json

from bico_ds.evaluation.request.questions import _task_identity
from bico_ds.evaluation.results import EvaluationResult, TaskResult
from bico_ds.evaluation.tasks.task import Question, Task

OF_0_1_0 = {
    "tasks": {
        "n2d": {
            "headline": "contains",
            "metrics": {"contains": 1.0},
            "intervals": {"contains": [0.5, 1.0]},
            "floors": {"contains": 0.25},
            "new_tokens": 9,
            "rows": [{"prompt": "q", "answer": " x", "prediction": " x", "group": "a", "contains": 1.0}],
        }
    }
}


def test_a_result_is_read_and_written_with_the_keys_of_version_0_1_0():
    result = EvaluationResult.from_json(OF_0_1_0)
    assert result.tasks["n2d"].prompts == OF_0_1_0["tasks"]["n2d"]["rows"]
    assert json.dumps(result.to_json()) == json.dumps(OF_0_1_0)
    assert "rows" not in result.to_json(prompts=False)["tasks"]["n2d"]
    bare = EvaluationResult(tasks={"n2d": TaskResult(headline="bleu", metrics={"bleu": 0.5})})
    assert EvaluationResult.from_json(bare.to_json()) == bare


def test_a_part_of_a_result_file_has_the_identity_that_version_0_1_0_gave_it():
    question = Question(prompt="a", completion=" b", group="g", line=1, alternatives=(" c",))
    task = Task(name="t", answer_kind="name", path="p", ends=("\n",), questions=(question,))
    assert _task_identity(task, 40, True) == "3745b1a57b9add15"


def test_a_text_whose_times_of_the_base_are_not_in_the_file_has_its_perplexity_alone():
    result = EvaluationResult.from_json({"tasks": {}, "texts": {"prose": {"perplexity": 9.0}}})
    assert result.scalars() == {"evaluation/text/prose/perplexity": 9.0}
