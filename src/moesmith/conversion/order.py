"""The order of a recipe's steps, defined only here."""

from __future__ import annotations

from moesmith.conversion.steps.finish import Baseline, Evaluate, Export
from moesmith.conversion.steps.text import Corpus, HeldOut
from moesmith.conversion.steps.training import Train
from moesmith.run.recipe import Recipe
from moesmith.run.step import Step


def steps_of(recipe: Recipe) -> list[Step]:
    """List a recipe's steps: text, the parent's perplexity, the method, training, the model, its perplexity."""
    made = recipe.method.steps()
    before = [step.name for step in made if step.title]
    trained: list[Step] = []
    for kind in (Train.router, Train.experts):
        if (step := kind(recipe, before[-1])) is not None:
            trained.append(step)
            before.append(step.name)
    training = {step.trains: step.loop for step in (*made, *trained) if step.trains}
    text: list[Step] = [HeldOut(recipe), Corpus(recipe, training), Baseline(recipe)]
    return [*text, *made, *trained, Export(recipe, before[-1]), Evaluate(recipe, before)]


def trains(recipe: Recipe) -> bool:
    """Whether any step trains."""
    return any(step.trains for step in steps_of(recipe))
