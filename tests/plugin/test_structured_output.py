"""Texts that have to fit a schema, a regular expression, a choice, a grammar or a tool, next to others that need not."""
from __future__ import annotations

import json
import re

import jsonschema
import pytest
from ask import chat, complete
from kinds_of_request import GRAMMAR, SCHEMA, TOOL

HOT = {"temperature": 1.0}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_text_fits_what_it_has_to_fit(alone, seed):
    hot = {**HOT, "seed": seed}
    number = alone(complete("Call me: ", 24, structured_outputs={"regex": "[0-9]{3}-[0-9]{4}"}, **hot)).only
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", number.text) and number.finish_reason == "stop"
    choices = ["blue", "green", "grey as lead"]
    assert alone(complete("The sky is ", 12, structured_outputs={"choice": choices}, **hot)).text in choices
    seen = alone(complete("I see ", 12, structured_outputs={"grammar": GRAMMAR}, **hot)).text
    assert re.fullmatch("the (red|blue) (cat|dog|fox)", seen)
    person = alone(complete("A person: ", 200, structured_outputs={"json": SCHEMA}, frequency_penalty=0.5, **hot))
    jsonschema.validate(json.loads(person.text), SCHEMA)


def test_a_chat_answers_by_a_schema(alone):
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    found = alone(chat("Who are you?", 200, response_format=wanted, frequency_penalty=0.5, **HOT, seed=2)).only
    jsonschema.validate(json.loads(found.text), SCHEMA)


def test_masks_are_joined(alone):
    """A grammar, allowed ids, bad words and a bias that would rather have something else."""
    choices = {"choice": ["blue", "green", "grey"]}
    assert alone(complete("The sky is ", 8, structured_outputs=choices, bad_words=["blue", "grey"])).text == "green"
    unwanted = {"253": 100.0}
    assert alone(complete("The sky is ", 8, structured_outputs=choices, logit_bias=unwanted)).text in choices["choice"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"])
def test_a_tool_is_called_with_what_its_schema_says(alone, choice):
    found = alone(chat("How is the weather in Rome?", 120, tools=[TOOL], tool_choice=choice)).only
    ((name, arguments),) = found.tools
    assert name == "get_weather"
    jsonschema.validate(json.loads(arguments), TOOL["function"]["parameters"])
    assert found.text == ""
