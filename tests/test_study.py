import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlvd_jax import config
from rlvd_jax.errors import UserError
from rlvd_jax.responses import Response
from rlvd_jax.study import Step, Study, digest

ROOT = Path(__file__).parents[1]

STUDY = """
study: tiny
problems:
  train: {file: train.jsonl}
  test: {file: test.jsonl}
models:
  pupil: {sft: {student: rl, teacher: wise, problems: train, samples: 4, keep: 2, only_solved_by: base}}
  base: {from: ./base, template: question}
  rl: {grpo: {start: base, problems: train, evaluate_on: test}}
  wise: {from: ./wise, template: r1}
  self: {sft: {student: base, teacher: base, problems: train}}
sampling: {samples: 6}
responses:
  - {models: [base, rl, self, pupil], problems: [test]}
comparisons:
  - {base: base, other: rl, problems: [test, train], claim: rl}
"""
SETS = {
    ("base", "test"): 6,
    ("rl", "test"): 6,
    ("self", "test"): 6,
    ("pupil", "test"): 6,
    ("base", "train"): 6,
    ("rl", "train"): 6,
    ("wise", "train"): 4,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the study's problems and two checkpoints, as the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("train", 6), ("test", 4)):
        lines = [json.dumps({"id": f"{name}{i}", "problem": f"{i}+1", "answer": str(i + 1)}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    for name in ("base", "wise"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        (tmp_path / name / "model.safetensors").write_bytes(name.encode() * 1000)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def study(*overrides) -> Study:
    return Study(config.load("study.yaml", overrides))


def identities(study: Study) -> dict[str, str]:
    """Of every model's weights and of every response set."""
    found = {model: study.identity(model) for model in study.config.models}
    return found | {f"{m} on {p}": digest(study.set_settings(m, p)) for m, p in study.needed}


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_what_is_needed_and_what_is_analysed(here):
    s = study()
    assert s.needed == SETS
    assert s.analysed == {key: n for key, n in SETS.items() if key != ("wise", "train")}
    more = study("responses.0.samples=3", "models.self.sft.samples=9", "models.pupil.sft.samples=")
    assert more.analysed == dict.fromkeys(
        [("base", "test"), ("rl", "test"), ("self", "test"), ("pupil", "test")], 3
    ) | {
        ("base", "train"): 6,  # a comparison's set that no response entry names
        ("rl", "train"): 6,
    }
    assert more.needed == more.analysed | {("base", "train"): 9, ("wise", "train"): 6}
    twice = study("responses=[{models: [base], problems: [test], samples: 3}, {models: [base], problems: [test]}]")
    assert twice.analysed["base", "test"] == 6


def test_steps(here):
    assert [step.name for step in study().steps] == [
        "sample base on test",
        "sample base on train",
        "train rl",
        "sample rl on test",
        "sample rl on train",
        "sample wise on train",
        "train pupil",
        "sample pupil on test",
        "train self",
        "sample self on test",
    ]
    # A model that nothing is asked of is trained all the same; a given one only if something is.
    lonely = study("responses=[{models: [base], problems: [test]}]", "comparisons=[]", "models.other={from: ./wise}")
    assert [step.name for step in lonely.steps if step.kind == "train"] == ["train rl", "train pupil", "train self"]
    assert not any(step.model == "other" for step in lonely.steps)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_step_comes_after_what_it_needs(path):
    s = Study(config.load(path))
    done = set()
    for step in s.steps:
        recipe = s.config.models[step.model]
        if step.kind == "respond":
            assert recipe.from_ is not None or Step("train", step.model) in done
        else:
            assert recipe.parent in s.config.models
            for model in s.config.needs(step.model):
                assert s.config.models[model].from_ is not None or Step("train", model) in done
            whole, wanted, used = s.config.sampling.samples, [], recipe.sft or recipe.grpo
            if sft := recipe.sft:
                wanted = [(sft.teacher, sft.samples or whole)]
                wanted += [(sft.only_solved_by, whole)] if sft.only_solved_by else []
            elif used.solved_by:
                wanted = [(used.solved_by, used.solved_samples or whole)]
            for model, samples in wanted:
                there = [x for x in done if (x.kind, x.model, x.problems) == ("respond", model, used.problems)]
                assert len(there) == 1 and there[0].samples >= samples
        assert step not in done
        done.add(step)
    assert {(x.model, x.problems): x.samples for x in done if x.kind == "respond"} == s.needed
    assert {x.model for x in done if x.kind == "train"} == {
        name for name, model in s.config.models.items() if model.from_ is None
    }


RL = {"rl", "rl on test", "rl on train", "pupil", "pupil on test"}
"""RL and what comes from it."""
TRAINED = RL | {"self", "self on test"}
FROM_BASE = TRAINED | {"base on test", "base on train"}
EVERY_SET = {f"{m} on {p}" for m, p in SETS}
CHANGES = {
    # what no result depends on
    "models.rl.grpo.micro_rows=8": set(),
    "models.rl.grpo.unroll=true": set(),
    "models.rl.grpo.checkpoint_every=1": set(),
    "models.self.sft.micro_rows=8": set(),
    "models.self.sft.unroll=true": set(),
    "models.self.sft.checkpoint_every=1": set(),
    "sampling.slots=4": set(),
    "grader.deadline=1": set(),
    "grader.workers=1": set(),
    "bootstrap=10": set(),
    "hardest=1": set(),
    "keep_checkpoints=true": set(),
    "mesh.fsdp=2": set(),
    "models.rl.paper=Qwen2.5-3B/rl": set(),
    "comparisons.0.claim=": set(),
    "study=other": set(),
    "output=elsewhere": set(),
    "models.base.from=base/../base": set(),
    # what is said again
    "models.rl.grpo.sampling.temperature=0.9": set(),
    "models.rl.grpo.evaluate_sampling.top_k=50": set(),
    "models.rl.template=question": set(),
    "models.rl.grpo.entropy=0": set(),
    "models.rl.grpo.k=5": set(),  # without advantage pass_at_k
    "models.pupil.sampling.max_tokens=4000": set(),
    "models.pupil.sft.samples=4": set(),
    # one model's recipe
    "models.rl.grpo.optimizer.learning_rate=1e-3": RL,
    "models.rl.grpo.steps=3": RL,
    "models.rl.grpo.kl=0.1": RL,
    "models.rl.grpo.entropy=0.1": RL,
    "models.rl.grpo.hard_samples=20": RL,
    "models.rl.grpo.advantage=pass_at_k": RL,
    "models.rl.grpo.solved_by=base": RL,
    "models.rl.grpo.sampling.top_p=0.5": RL,
    "models.rl.grpo.evaluate_sampling.top_p=0.5": RL,
    "models.rl.grpo.evaluate_on=train": RL,
    "models.rl.grpo.problems=test": RL,
    "models.rl.context=100": RL,
    "models.rl.template=r1": RL,
    "models.rl.sampling.top_k=5": RL,
    "models.self.sft.epochs=1": {"self", "self on test"},
    "models.self.sft.samples=5": {"self", "self on test"},
    "models.self.sft.optimizer.b2=0.9": {"self", "self on test"},
    "models.pupil.sft.keep=1": {"pupil", "pupil on test"},
    "models.pupil.sft.samples=3": {"pupil", "pupil on test"},
    "models.pupil.sft.only_solved_by=": {"pupil", "pupil on test"},
    "models.pupil.sft.only_solved_by=rl": {"pupil", "pupil on test"},
    "models.pupil.sampling.temperature=0.5": {"pupil on test"},
    # a given model
    "models.base.template=r1": FROM_BASE | {"base"},
    "models.base.context=100": FROM_BASE | {"base"},
    "models.base.from=./wise": FROM_BASE | {"base"},
    "models.base.sampling.temperature=0.5": FROM_BASE,
    "models.wise.template=question": {"wise", "wise on train", "pupil", "pupil on test"},
    "models.wise.sampling.top_k=5": {"wise on train", "pupil", "pupil on test"},
    # the whole study
    "seed=1": TRAINED | EVERY_SET,
    "dtype=bfloat16": TRAINED | EVERY_SET,
    "save_dtype=float32": TRAINED,
    "sampling.temperature=0.5": TRAINED | EVERY_SET,
    # More samples keep every set; what learns from all samples, or asks whether one of them is right, is made anew.
    "sampling.samples=7": {"self", "self on test", "pupil", "pupil on test"},
    "problems.test.limit=2": RL | {f"{m} on test" for m, p in SETS if p == "test"},
    "problems.train.limit=2": TRAINED | {f"{m} on train" for m, p in SETS if p == "train"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_identity_changes_with_what_it_depends_on_alone(here, change):
    assert changed(identities(study()), identities(study(change))) == CHANGES[change]


def test_solved_examples_are_part_of_the_graph(here):
    plain, lent = study(), study("models.rl.grpo.solved_by=wise", "models.rl.grpo.solved_samples=5")
    assert lent.needed == plain.needed | {("wise", "train"): 5}
    assert lent.analysed == plain.analysed, "they are not measured"
    names = [step.name for step in lent.steps]
    assert names.index("sample wise on train") < names.index("train rl")
    assert lent.config.needs("rl") == ["base", "wise"] and "wise" in lent.config.ancestors("pupil")
    assert changed(identities(plain), identities(lent)) == RL
    template = "models.wise.template=question"
    assert changed(
        identities(lent),
        identities(study("models.rl.grpo.solved_by=wise", "models.rl.grpo.solved_samples=5", template)),
    ) == RL | set(CHANGES[template])
    all_samples = [study("models.rl.grpo.solved_by=wise", *more) for more in ([], ["models.rl.grpo.solved_samples=6"])]
    assert all_samples[0].needed["wise", "train"] == 6
    assert not changed(*(identities(s) for s in all_samples))


def test_settings_that_came_later_leave_identities_as_they_were(here):
    before = study().config.models["rl"].grpo.identity(set())
    assert not {"k", "entropy", "hard_samples", "solved_by", "solved_samples"} & before.keys()
    assert before["kl"] == 0 and before["advantage"] == "grpo"


def test_evaluation_depends_on_the_studys_sampling(here):
    """Also where the practice responses don't, since they have a setting of their own."""
    own = "models.rl.grpo.sampling.max_tokens=100"
    short, long = (study(own, f"sampling.max_tokens={n}") for n in (200, 300))
    assert short.identity("rl") != long.identity("rl")
    short, long = (study(own, f"sampling.max_tokens={n}", "models.rl.grpo.evaluate_on=") for n in (200, 300))
    assert short.identity("rl") == long.identity("rl")


def test_an_identity_changes_with_the_files_it_depends_on(here):
    before = identities(study())
    for name in ("README.md", "SOURCE.json"):
        (here / "base" / name).write_text("{}")
    assert not changed(before, identities(study()))

    whole = (here / "base" / "model.safetensors").read_bytes()
    for at in (0, len(whole) // 2, len(whole) - 1):
        (here / "base" / "model.safetensors").write_bytes(whole[:at] + b"?" + whole[at + 1 :])
        assert changed(before, identities(study())) == FROM_BASE | {"base"}
    (here / "base" / "model.safetensors").write_bytes(whole)
    assert not changed(before, identities(study()))

    (here / "base" / "generation_config.json").write_text("{}")  # it has end tokens
    assert changed(before, identities(study())) == FROM_BASE | {"base"}
    (here / "base" / "generation_config.json").unlink()

    (here / "train.jsonl").write_text((here / "train.jsonl").read_text().replace('"answer": "1"', '"answer": "2"'))
    assert changed(before, identities(study())) == CHANGES["problems.train.limit=2"]


def test_folders_and_what_is_done(here):
    s = study("output=out")
    assert s.root == Path("out/tiny") and s.report == Path("out/tiny/report")
    assert s.training("rl") == Path(f"out/tiny/models/rl-{s.identity('rl')[:8]}")
    assert s.checkpoint("rl") == s.training("rl") / "model" and s.checkpoint("base") == Path("base")
    assert not any(s.done(step) for step in s.steps) and s.result("rl") is None
    assert not Path("out").exists()  # looking leaves no trace

    sampled = s.responses("base", "test")
    sampled.add([Response(f"test{i}", k, "t", 1, -1.0, "end", "1", True) for i in range(4) for k in range(6) if i != k])
    (step,) = [x for x in s.steps if x.name == "sample base on test"]
    assert s.missing(step) == {f"test{i}": [i] for i in range(4)} and not s.done(step)
    s.responses("base", "test").add([Response(f"test{i}", i, "t", 1, -1.0, "end", "1", True) for i in range(4)])
    assert [x.name for x in s.steps if s.done(x)] == ["sample base on test"]
    assert study("output=out", "sampling.samples=7").missing(step) == {}
    assert study("output=out", "sampling.samples=7").missing(Step("respond", "base", "test", 7)) == {
        f"test{i}": [6] for i in range(4)
    }
    assert not any(study("output=out", "seed=1").done(x) for x in s.steps)

    s.training("rl").mkdir(parents=True)
    (s.training("rl") / "result.json").write_text('{"step": 3}')
    assert s.result("rl") == {"step": 3} and s.done(Step("train", "rl"))
    (s.training("rl") / "result.json").write_text('{"step": ')
    with pytest.raises(UserError, match=r"result.json: damaged; remove the folder to train again"):
        s.done(Step("train", "rl"))


def test_a_checkpoint_that_is_not_there(here):
    s = study("models.base.from=./bsae")
    for what in (lambda: s.identity("base"), lambda: s.identity("rl"), lambda: s.checkpoint("base")):
        with pytest.raises(UserError, match=r"^./bsae: there is no such checkpoint directory"):
            what()


def test_looking_at_a_study_imports_no_jax():
    code = "import sys, rlvd_jax.config, rlvd_jax.study; assert not {'jax', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
