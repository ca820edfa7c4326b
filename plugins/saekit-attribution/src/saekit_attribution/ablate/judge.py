"""The judge, which sorts answers into classes, and the shares of the classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from saekit import OptionError, named_function

Judge = Callable[[str, str, str], str]
"""Maps a prompt, a response and the template type to the name of a class."""
NO_CLASS = ""
"""The class of an answer that belongs to none."""


def organism_judge(prompt: str, response: str, template_type: str) -> str:
    """The class by the lexicon of the organism's planted behaviour: like, dislike, neutral or other."""
    from saekit.organism import classify

    return classify(response)


def load_judge(name: str) -> Judge:
    """The function named by "module:function". UsageError if there is none."""
    return named_function(name, "judge", "(prompt, response, template_type)")


def judged(judge: Judge, prompts: Sequence[str], responses: Sequence[str], template_type: str) -> list[str]:
    """The class of each response. UsageError if the judge returns anything but a name."""
    classes = [judge(prompt, response, template_type) for prompt, response in zip(prompts, responses, strict=True)]
    for name in classes:
        if not isinstance(name, str):
            raise OptionError("judge", f"it returned {name!r}. Return the name of a class as text.")
    return classes


def share_of(classes: Sequence[str], name: str) -> float:
    """The share of answers in the class; 0 if there are none."""
    return Counter(classes)[name] / len(classes) if classes else 0.0


def commonest(classes: Sequence[str]) -> str:
    """The most frequent class; ties go to the first by name. ValueError if there is none."""
    return min(Counter(classes).items(), key=lambda item: (-item[1], item[0]))[0]
