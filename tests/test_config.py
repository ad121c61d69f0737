import re
from pathlib import Path

import pytest
import yaml

from rlvd_jax import config
from rlvd_jax.config import GRPOConfig, SamplingConfig, SFTConfig, StudyConfig
from rlvd_jax.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))

STUDY = """
study: tiny
problems:
  train: {demo: train}
  test: {file: test.jsonl}
models:
  base: {from: some/model, template: qwen-math, sampling: {top_k: 20}}
  rl: {grpo: {start: base, problems: train, evaluate_on: test, optimizer: {learning_rate: 1e-5}}, context: 512}
  pupil: {sft: {student: rl, teacher: base, problems: train, optimizer: {weight_decay: 0}}, sampling: {top_p: 0.5}}
responses:
  - {models: [base, rl], problems: [test]}
  - {models: [pupil], problems: [train, test], samples: 8}
comparisons:
  - {base: base, other: rl, problems: [test], claim: rl}
"""


def load(tmp_path, *overrides, text=STUDY) -> StudyConfig:
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load(path, overrides)


def refused(tmp_path, *overrides, text=STUDY) -> str:
    """The sentence that refuses the config, without the file's name."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message.removeprefix(str(tmp_path / "study.yaml")).removeprefix(": ")


def test_the_defaults_are_the_papers():
    a12 = {
        "samples": 256,
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 1.0,
        "max_tokens": 4000,
        "slots": None,
        "tensor": None,
        "drafts": 63,
    }
    assert SamplingConfig().model_dump() == a12
    grpo = GRPOConfig(start="base", problems="train").model_dump()
    table6 = {
        "learning_rate": 1e-6,
        "warmup_steps": 20,
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": 0.1,
    }
    assert grpo.pop("optimizer") == table6
    assert (grpo["steps"], grpo["questions"], grpo["samples"]) == (225, 28, 10)
    assert (grpo["clip_low"], grpo["clip_high"], grpo["kl"], grpo["updates"]) == (0.2, 0.2, 0.0, 1)
    assert (grpo["evaluate_every"], grpo["evaluate_samples"], grpo["keep"]) == (25, 10, "best")
    assert (grpo["advantage"], grpo["ratio"], grpo["dynamic_sampling"]) == ("grpo", "token", False)
    assert {k: v for k, v in grpo["evaluate_sampling"].items() if v is not None} == {"temperature": 0.8, "top_p": 0.9}
    sft = SFTConfig(student="base", teacher="base", problems="train").model_dump()
    table7 = table6 | {"warmup_steps": 25, "b2": 0.95, "weight_decay": 1e-4}
    assert sft.pop("optimizer") == table7
    assert (sft["epochs"], sft["batch"], sft["max_length"], sft["keep"]) == (5, 4, 32768, 8)
    study = StudyConfig(study="s", problems={"p": {"demo": "test"}}, models={"m": {"from": "a/b"}}, responses=())
    assert (study.bootstrap, study.hardest, study.seed, study.grader.deadline) == (2000, 50, 0, 5.0)


def test_a_study(tmp_path):
    study = load(tmp_path)
    grpo, sft = study.models["rl"].grpo, study.models["pupil"].sft
    assert (grpo.optimizer.learning_rate, grpo.optimizer.b2, grpo.optimizer.warmup_steps) == (1e-5, 0.99, 20)
    assert (sft.optimizer.weight_decay, sft.optimizer.b2, sft.optimizer.warmup_steps) == (0, 0.95, 25)  # Table 7's
    assert [study.models[m].parent for m in study.models] == [None, "base", "rl"]
    assert study.ancestors("pupil") == ["rl", "base"] and study.needs("pupil") == ["rl", "base"]
    assert {study.template(m) for m in study.models} == {"qwen-math"}  # by descent
    assert [study.context(m) for m in study.models] == [None, 512, 512]
    assert study.model_sampling("pupil") == SamplingConfig(top_k=20, top_p=0.5)
    changed = study.model_sampling("rl", grpo.evaluate_sampling)
    assert changed == SamplingConfig(top_k=20, temperature=0.8, top_p=0.9)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_packages_configs_load(path):
    study = config.load(path)
    assert study.study == path.stem
    again = config.parse(yaml.safe_load(yaml.safe_dump(study.written())), "again")
    assert again == study


def test_the_papers_configs_have_the_papers_settings():
    """Tables 6 and 7 and appendix A.12, wherever the paper's models are trained."""
    studies = {path.stem: config.load(path) for path in CONFIGS if path.stem.startswith("qwen")}
    studies = {name: study for name, study in studies.items() if not name.endswith("-h100")}  # those are scaled down
    assert set(studies) == {"qwen2.5-0.5b", "qwen2.5-3b", "qwen2.5-math-1.5b"}
    for study in studies.values():
        assert study.sampling == SamplingConfig()
        for name, model in study.models.items():
            if model.grpo:
                assert model.grpo == GRPOConfig(start="base", problems="math-train", evaluate_on="math-500")
            if model.sft:
                kept = {"keep": 4, "samples": 8} if model.sft.teacher == "teacher" else {"keep": 8, "samples": None}
                assert {k: getattr(model.sft, k) for k in kept} == kept
                defaults = SFTConfig(student="s", teacher="t", problems="p").model_dump()
                for key in defaults.keys() - {"student", "teacher", "problems", "only_solved_by", "keep", "samples"}:
                    assert getattr(model.sft, key) == getattr(SFTConfig(**defaults), key), (name, key)
    aime = [(r.models, r.samples) for r in studies["qwen2.5-3b"].responses if "aime25" in r.problems and r.samples]
    assert aime == [(("base",), 512), (("teacher",), 64)]
    for stem in ("qwen2.5-3b", "qwen2.5-math-1.5b"):
        qwq = studies[stem].models["teacher"]
        assert (qwq.from_, qwq.template) == ("Qwen/QwQ-32B", "r1")
        sampled = studies[stem].model_sampling("teacher")
        assert (sampled.temperature, sampled.top_p, sampled.top_k) == (0.6, 0.95, 50)


REFUSED = {
    # unknown keys: anywhere, with the nearest known one
    "sampels=4": "'sampels' is not a setting (did you mean 'sampling'?)",
    "sampling.sampels=4": "'sampling.sampels' is not a setting (did you mean 'samples'?)",
    "problems.train.fiel=x": "'problems.train.fiel' is not a setting (did you mean 'file'?)",
    "models.base.form=x": "'models.base.form' is not a setting (did you mean 'from'?)",
    "models.base.smapling={}": "'models.base.smapling' is not a setting (did you mean 'sampling'?)",
    "models.base.sampling.topk=3": "'models.base.sampling.topk' is not a setting (did you mean 'top_k'?)",
    "models.rl.grpo.step=3": "'models.rl.grpo.step' is not a setting (did you mean 'steps'?)",
    "models.rl.grpo.optimizer.lerning_rate=3": "'models.rl.grpo.optimizer.lerning_rate' is not a setting (did you mean "
    "'learning_rate'?)",
    "models.pupil.sft.optimizer.warmup=3": "'models.pupil.sft.optimizer.warmup' is not a setting (did you mean "
    "'warmup_steps'?)",
    "models.rl.grpo.evaluate_sampling.top_q=1": "'models.rl.grpo.evaluate_sampling.top_q' is not a setting (did you "
    "mean 'top_p'?)",
    "responses.1.model=[base]": "'responses.1.model' is not a setting (did you mean 'models'?)",
    "comparisons.0.clam=rl": "'comparisons.0.clam' is not a setting (did you mean 'claim'?)",
    "mesh.zzz=1": "'mesh.zzz' is not a setting (known: data, fsdp, tensor)",
    # ... and not a missing one that was misspelt
    "models.rl={grpo: {strat: base, problems: train}}": "'models.rl.grpo.strat' is not a setting (did you mean "
    "'start'?)",
    "models.rl={grpo: {start: base}}": "models.rl.grpo.problems: is missing",
    # wrong types
    "sampling.samples=many": "sampling.samples: input should be a valid integer, unable to parse string as an integer, "
    "not 'many'",
    "sampling.samples=1.5": "sampling.samples: input should be a valid integer, got a number with a fractional part, "
    "not 1.5",
    "sampling.samples=true": "sampling.samples: neither true nor false can stand here, it is true",
    "sampling.temperature=off": "sampling.temperature: neither true nor false can stand here, it is false",
    "sampling.temperature=[1]": "sampling.temperature: input should be a valid number, not [1]",
    "sampling=5": "sampling: should be a mapping, not 5",
    "models.base=5": "models.base: should be a mapping, not 5",
    "models=[]": "models: should be a mapping, not []",
    "responses.0.models=base": "responses.0.models: should be a list, not 'base'",
    "problems.train.levels=[true]": "problems.train.levels.0: input should be a valid integer, not True",
    "keep_checkpoints=perhaps": "keep_checkpoints: input should be a valid boolean, unable to interpret input, not "
    "'perhaps'",
    "models.base.from=5": "models.base.from: input should be a valid string, not 5",
    "study=2024": "study: input should be a valid string, not 2024",
    # impossible values
    "sampling.samples=0": "sampling.samples: input should be greater than 0, not 0",
    "sampling.top_p=1.5": "sampling.top_p: input should be less than or equal to 1, not 1.5",
    "sampling.temperature=.nan": "sampling.temperature: input should be a finite number, not nan",
    "models.rl.grpo.optimizer.learning_rate=.inf": "models.rl.grpo.optimizer.learning_rate: input should be a finite "
    "number, not inf",
    "models.rl.grpo.samples=1": "models.rl.grpo.samples: input should be greater than or equal to 2, not 1",
    "models.rl.grpo.sampling.temperature=0": "models.rl.grpo.sampling.temperature: at 0 all responses of a group are "
    "alike; set it above",
    "seed=-1": "seed: input should be greater than or equal to 0, not -1",
    "problems.train.seed=4294967296": "problems.train.seed: input should be less than 4294967296, not 4294967296",
    "models.rl.grpo={start: base, problems: train, samples: 4, advantage: pass_at_k}": "models.rl.grpo: k is 4, so all "
    "sets of k of the 4 samples would be alike; set it below samples",
    "models.rl.grpo.hard_samples=10": "models.rl.grpo: hard_samples is 10, in all, and 10 samples are drawn of every "
    "question; set it above samples",
    "models.rl.grpo.solved_samples=10": "models.rl.grpo: solved_samples says how many responses of solved_by to choose "
    "from; set solved_by too",
    "models.rl.grpo.entropy=-1": "models.rl.grpo.entropy: input should be greater than or equal to 0, not -1",
    "device=gpux": "device: 'gpux' is not a choice (did you mean 'gpu'?)",
    "models.rl.grpo.advantage=drgrpo": "models.rl.grpo.advantage: 'drgrpo' is not a choice (did you mean 'dr_grpo'?)",
    "comparisons.0.claim=reasoning": "comparisons.0.claim: 'reasoning' is not a choice (did you mean "
    "'reasoning_only'?)",
    "problems.train.demo=tset": "problems.train.demo: 'tset' is not a choice (did you mean 'test'?)",
    "models.base.template=qwen-maht": "models.base: template: 'qwen-maht' is neither a template nor a text with "
    "{question} (did you mean 'qwen-math'?)",
    "models.base.template='Q: {q}'": "models.base: template: 'Q: {q}' is neither a template nor a text with {question} "
    "(known: question, qwen-math, r1)",
    "models.base.paper=Qwen2.5-3B/bsae": "models.base: the paper has no figures for 'Qwen2.5-3B/bsae' (did you mean "
    "'Qwen2.5-3B/base'?)",
    "study=a/b": "study: 'a/b' cannot be a name: letters, digits, dots, hyphens and underscores can",
    "models.a b={from: x/y}": "models: 'a b' cannot be a name: letters, digits, dots, hyphens and underscores can",
    "models={no: {from: x/y}}": "models: False cannot be a name: letters, digits, dots, hyphens and underscores can",
    "models={}": "models: needs at least one entry",
    "problems.train.hub=math-train": "problems.train: give exactly one of file, hub and demo",
    "problems.train={}": "problems.train: give exactly one of file, hub and demo",
    "models.base={template: r1}": "models.base: give exactly one of from, grpo and sft",
    "models.rl.from=a/b": "models.rl: give exactly one of from, grpo and sft",
    # references
    "models.rl.grpo.start=bsae": "models.rl.grpo.start: 'bsae' is not declared (did you mean 'base'?)",
    "models.rl.grpo.problems=trian": "models.rl.grpo.problems: 'trian' is not declared (did you mean 'train'?)",
    "models.rl.grpo.evaluate_on=x": "models.rl.grpo.evaluate_on: 'x' is not declared (known: test, train)",
    "models.rl.grpo.solved_by=bas": "models.rl.grpo.solved_by: 'bas' is not declared (did you mean 'base'?)",
    "models.rl.grpo.solved_by=pupil": "models.rl: the recipe goes round in a circle: rl → pupil → rl",
    "models.pupil.sft.student=x": "models.pupil.sft.student: 'x' is not declared (known: base, pupil, rl)",
    "models.pupil.sft.teacher=lr": "models.pupil.sft.teacher: 'lr' is not declared (did you mean 'rl'?)",
    "models.pupil.sft.problems=x": "models.pupil.sft.problems: 'x' is not declared (known: test, train)",
    "models.pupil.sft.only_solved_by=bas": "models.pupil.sft.only_solved_by: 'bas' is not declared (did you mean "
    "'base'?)",
    "responses.0.models.1=pupli": "responses.0.models: 'pupli' is not declared (did you mean 'pupil'?)",
    "responses.1.problems.0=x": "responses.1.problems: 'x' is not declared (known: test, train)",
    "comparisons.0.base=x": "comparisons.0.base: 'x' is not declared (known: base, pupil, rl)",
    "comparisons.0.other=x": "comparisons.0.other: 'x' is not declared (known: base, pupil, rl)",
    "comparisons.0.problems=[x]": "comparisons.0.problems: 'x' is not declared (known: test, train)",
    "models.rl.grpo.start=pupil": "models.rl: the recipe goes round in a circle: rl → pupil → rl",
    "models.rl.grpo.start=rl": "models.rl: the recipe goes round in a circle: rl → rl",
    "models.pupil.sft.only_solved_by=pupil": "models.pupil: the recipe goes round in a circle: pupil → pupil",
    # overrides
    "sampling": "'sampling' is not an override: write key=value, for example sampling.samples=16",
    "=4": "'=4' is not an override: write key=value, for example sampling.samples=16",
    "sampling.samples={a": "'sampling.samples={a': the value is not YAML",
    "sampling={samples: 1, samples: 2}": "'sampling={samples: 1, samples: 2}': the value is not YAML",
    "responses.2.samples=4": "'responses.2.samples=4': '2' is not a position in a list of 2, counted from 0",
    "responses.x.samples=4": "'responses.x.samples=4': 'x' is not a position in a list of 2, counted from 0",
    "responses.²=4": "'responses.²=4': '²' is not a position in a list of 2, counted from 0",
    "responses.0.models.0.x=4": "responses.0.models.0: input should be a valid string, not {'x': 4}",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_is_refused(tmp_path, change):
    assert refused(tmp_path, change) == REFUSED[change]


def test_overrides(tmp_path):
    study = load(
        tmp_path,
        "sampling.samples=16",
        "sampling.slots=",
        "sampling={temperature: 1, top_k: 0}",
        "sampling.max_tokens=1e2",
        "models.rl.grpo.optimizer.learning_rate=3e-4",
        "models.rl.grpo.optimizer.clip_norm=",
        "models.rl.grpo.dynamic_sampling=yes",
        "models.qwen2.5.sampling.top_p=0.25",
        "responses.0={models: [base], problems: [train], samples: 3}",
        "responses.1.models.0=rl",
        "responses.1.samples=null",
        "comparisons=[]",
        "problems.test={demo: test, levels: [1, 2]}",
        "problems.test.levels.1=4",
        "output=a=b",
        text=STUDY.replace("models:\n", "models:\n  qwen2.5: {from: a/b}\n"),
    )
    assert study.sampling == SamplingConfig(temperature=1, top_k=0, max_tokens=100)  # a later mapping replaces
    assert study.models["rl"].grpo.optimizer.learning_rate == 3e-4
    assert study.models["rl"].grpo.optimizer.clip_norm is None
    assert study.models["rl"].grpo.dynamic_sampling is True
    assert study.model_sampling("qwen2.5").top_p == 0.25
    assert [(r.models, r.problems, r.samples) for r in study.responses] == [
        (("base",), ("train",), 3),
        (("rl",), ("train", "test"), None),
    ]
    assert study.comparisons == () and study.problems["test"].levels == (1, 4) and study.output == "a=b"


def test_what_is_written_reads_back_as_the_same(tmp_path):
    study = load(
        tmp_path, "models.rl.grpo.optimizer.clip_norm=", "models.rl.grpo.evaluate_every=null", "sampling.slots=4"
    )
    written = study.written()
    assert written["models"]["base"]["from"] == "some/model"
    assert written["models"]["rl"]["grpo"]["optimizer"]["clip_norm"] is None  # not its default
    assert "slots" not in load(tmp_path).written()["sampling"] and written["sampling"]["slots"] == 4
    assert load(tmp_path, text=yaml.safe_dump(written)) == study


def test_anchors_are_copies(tmp_path):
    text = STUDY + (
        "  - &c {base: base, other: pupil, problems: [test]}\n"
        "  - {<<: *c, other: rl, problems: &p [train]}\n  - {base: rl, other: pupil, problems: *p}\n"
    )
    study = load(tmp_path, "comparisons.1.problems.0=train", "comparisons.3.problems.0=test", text=text)
    assert [c.problems for c in study.comparisons] == [("test",), ("train",), ("train",), ("test",)]
    assert study.comparisons[2].base == "base" and study.comparisons[2].other == "rl"
    demo = config.load(next(path for path in CONFIGS if path.stem == "demo"))
    first, *others = [name for name, model in demo.models.items() if model.sft]
    changed = config.load(CONFIGS[0].with_stem("demo"), [f"models.{first}.sft.optimizer.learning_rate=0.125"])
    assert changed.models[first].sft.optimizer.learning_rate == 0.125
    assert others and all(changed.models[name] == demo.models[name] for name in others)


def test_numbers_without_a_dot(tmp_path):
    for text, value in {"1e-6": 1e-6, "2E-3": 2e-3, "+1e-2": 1e-2, "1.5e-3": 1.5e-3, "1": 1.0}.items():
        study = load(tmp_path, text=STUDY.replace("1e-5", text))
        assert study.models["rl"].grpo.optimizer.learning_rate == value
    assert load(tmp_path, "study=1e6x").study == "1e6x"


MALFORMED = {
    "unclosed": ("study: [a", r", line 1: not valid YAML: "),
    "a tab": (
        STUDY.replace("  train:", "\ttrain:"),
        r", line 4: not valid YAML: found character '\\t' that cannot start",
    ),
    "a key given twice": (
        STUDY.replace("  test: {", "  train: {"),
        r", line 5: not valid YAML: 'train' is given twice, first in line 4$",
    ),
    "a setting given twice": (
        STUDY.replace("top_k: 20", "top_k: 20, top_p: 1, top_k: 30"),
        r", line 7: not valid YAML: 'top_k' is given twice, first in line 7$",
    ),
    "two documents": (STUDY + "---\na: 1\n", r", line \d+: not valid YAML: but found another document"),
    "a control character": ("study: \x00", r"not valid YAML: unacceptable character #x0000: .* not allowed$"),
    "a tag": ("study: !!python/name:os.system", r", line 1: not valid YAML: could not determine a constructor"),
    "an unknown anchor": ("study: *a", r", line 1: not valid YAML: found undefined alias 'a'$"),
    "a circle": ("study: &a [*a]", r"not valid YAML: it is nested too deeply, or holds itself$"),
    "deep": ("[" * 100_000, r"not valid YAML: it is nested too deeply, or holds itself$"),
    "empty": ("# nothing\n", r"a study config is a mapping of settings, this is empty$"),
    "a list": ("- a\n", r"a study config is a mapping of settings, this is a list$"),
    "text": ("hello", r"a study config is a mapping of settings, this is a str$"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_yaml(tmp_path, case):
    text, message = MALFORMED[case]
    assert re.match(message, refused(tmp_path, text=text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml: there is no such config file$"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory$"):
        config.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"study: caf\xe9\n")
    with pytest.raises(UserError, match=r"latin.yaml: cannot be read: 'utf-8' codec can't decode byte 0xe9"):
        config.load(tmp_path / "latin.yaml")


def test_steps_to_profile(tmp_path):
    assert load(tmp_path).profiled is None
    study = load(tmp_path, "profile=10:12")  # a number of seconds to other readers of YAML
    assert list(study.profiled) == [10, 11, 12]
    assert load(tmp_path, text=yaml.safe_dump(study.written())) == study
    for wrong in ("12:10", "0:3", "5", "1:2:3", "a:b"):
        assert re.match(
            r"profile: .* is not first:last, two steps counted from 1, as in 10:12",
            refused(tmp_path, f"profile={wrong}"),
        )
