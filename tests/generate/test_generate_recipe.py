"""finerank generate: base, adapter and run folder; prompts from the command line, a file and a pipe."""

import io
import json
import shutil

import pytest
import torch

from finerank import cli, config
from finerank.adapters.files import save_adapter
from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.data.settings import TemplateSettings
from finerank.data.templates import load_template
from finerank.generate.engine import Generator
from finerank.generate.load import load_generator
from finerank.generate.settings import GeneratorSettings, SamplingSettings
from finerank.models.settings import ModelSettings
from finerank.models.tokenizer import load_tokenizer
from finerank.recipes.generate import Settings
from tiny import save_tiny, tiny_model


@pytest.fixture
def base(tmp_path):
    return save_tiny(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter that changes the answers, as PEFT would leave it: no tokenizer, no template."""
    model = tiny_model()
    adapters = inject_adapters(model, AdapterSettings(lora_r=4), seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(adapters.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    folder = tmp_path / "adapter"
    save_adapter(adapters, folder, base_model_name=str(base))
    return folder


@pytest.fixture
def run_folder(base, adapter, tmp_path):
    """A run folder: the adapter with its tokenizer and the template it was trained with."""
    folder = tmp_path / "run"
    shutil.copytree(adapter, folder)
    tokenizer = load_tokenizer(ModelSettings(load=str(base)))
    tokenizer.save_pretrained(folder)
    template = load_template(TemplateSettings(prompt_type="alpaca"), tokenizer)
    stored = {"name": template.name, "digest": template.digest, "settings": {"prompt_type": "alpaca"}}
    (folder / "template.json").write_text(json.dumps(stored))
    return folder


def generate(*argv):
    return cli.main(["generate", "--greedy", "--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "12", *argv])


def answer_of(capsys, *argv):
    assert generate(*map(str, argv)) == 0
    return capsys.readouterr().out


def test_a_prompt_is_answered_as_transformers_would(base, capsys):
    printed = answer_of(capsys, "--load", base, "Hi")
    tokenizer = load_tokenizer(ModelSettings(load=str(base)))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = tiny_model().generate(**prompt, do_sample=False, max_new_tokens=12)
    expected = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert printed == expected + "\n"


def test_an_adapter_folder_brings_its_base(base, adapter, capsys):
    plain = answer_of(capsys, "--load", base, "Hi")
    tuned = answer_of(capsys, "--load", adapter, "Hi")
    assert tuned == answer_of(capsys, "--load", base, "--lora-load", adapter, "Hi") != plain


def test_a_run_answers_with_the_template_it_was_trained_with(base, run_folder, capsys):
    tuned = answer_of(capsys, "--load", run_folder, "Hi")
    assert tuned == answer_of(capsys, "--load", base, "--lora-load", run_folder, "--prompt-type", "alpaca", "Hi")
    assert generate("--load", str(run_folder), "--prompt-type", "chatml", "Hi") == 2
    assert "give --template-anyway" in capsys.readouterr().err
    assert answer_of(capsys, "--load", run_folder, "--prompt-type", "chatml", "--template-anyway", "Hi") != tuned
    checkpoint = run_folder / "checkpoint-5"
    checkpoint.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run_folder / name, checkpoint)
    assert answer_of(capsys, "--load", checkpoint, "Hi") == tuned, "a checkpoint uses its run's template"


def test_an_adapter_trained_on_another_base_is_said(base, run_folder, caplog, capsys):
    (run_folder / "results.json").write_text(json.dumps({"base_model_digest": "0" * 64}))
    answer_of(capsys, "--load", run_folder, "Hi")
    assert "was trained on other base weights" in caplog.text


def test_a_file_of_prompts_gives_a_file_of_answers(base, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "Hi", "id": 1},
        {"messages": [{"role": "user", "content": "Explain the moon"}], "system": "Be short."},
        "你好",
        {"prompt": "Hi", "id": 4},
    ]
    prompts.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    out = tmp_path / "out" / "answers.jsonl"
    args = ["--load", base, "--input", prompts, "--batch-size", "3"]
    answer_of(capsys, *args, "--output", out)
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [a.get("id") for a in answers] == [1, None, None, 4] and answers[2]["prompt"] == "你好"
    assert answers[0]["answer"] == answers[3]["answer"] != answers[1]["answer"]
    assert answers[0]["answer"] + "\n" == answer_of(capsys, "--load", base, "Hi")
    assert answer_of(capsys, *args) == out.read_text(encoding="utf-8")
    text = tmp_path / "prompts.txt"
    text.write_text("Hi\n\n你好\n", encoding="utf-8")
    printed = answer_of(capsys, "--load", base, "--input", text)
    assert [json.loads(line)["answer"] for line in printed.splitlines()] == [a["answer"] for a in answers[::2]]


def test_ctrl_c_keeps_the_answers_that_are_done(base, tmp_path, capsys, monkeypatch):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("Hi\nYou\nMoon\n")
    whole = answer_of(capsys, "--load", base, "--input", prompts)
    real, calls = Generator.answer_all, []

    def interrupted_at_the_third(self, *args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **options)

    monkeypatch.setattr(Generator, "answer_all", interrupted_at_the_third)
    flags = ["--load", str(base), "--input", str(prompts), "--output", str(out), "--batch-size", "1"]
    assert generate(*flags) == 130
    assert f"the first 2 of 3 answers are done in {out}" in capsys.readouterr().err
    assert out.read_text().splitlines() == whole.splitlines()[:2]


def test_the_default_model_answers_sensibly(smollm2, capsys):
    assert answer_of(capsys, "--load", smollm2, "What is the capital of France?") == "The capital of France is Paris.\n"
    answer = answer_of(
        capsys, "--load", smollm2, "--system", "You answer in capitals.", "--stop", "Paris", "--", "Paris?"
    )
    assert "Paris" not in answer


def test_a_prompt_comes_from_a_pipe(base, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert answer_of(capsys, "--load", base) == answer_of(capsys, "--load", base, "Hi")


def test_seeds_make_answers_reproducible(base):
    generator = load_generator(GeneratorSettings(load=str(base), device="cpu", dtype="fp32"))
    from finerank.generate.prompts import make_messages

    def texts(seed):
        sampling = SamplingSettings(temperature=1.5, max_new_tokens=12, seed=seed)
        return "".join(generator.stream(make_messages("Hi", None), sampling))

    assert texts(1) == texts(1) != texts(2)


@pytest.mark.parametrize("flags", [["--bf16", "Hi"], ["Hi", "--bf16"], ["--bf16", "true", "Hi"], ["--bf16=true", "Hi"]])
def test_a_prompt_may_follow_a_switch(flags):
    parsed = config.parse(Settings, flags, verb="generate").settings
    assert parsed.prompt == "Hi" and parsed.bf16
    negative = config.parse(Settings, ["--no-bf16", "Hi"], verb="generate").settings
    assert negative.prompt == "Hi" and not negative.bf16


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"text": "b"}\n', 'line 2 has neither "prompt"'),
        ("{]\n", "line 1 is not JSON"),
        ("3\n", "line 1 is no prompt"),
        ('{"prompt": 3}\n', 'line 1 has neither "prompt"'),
        ('{"messages": []}\n', "the last message must be the user's"),
        ('{"messages": [{"role": "king", "content": "a"}]}\n', 'each message needs a "role"'),
        ('{"prompt": "\\ud800"}\n', "not valid UTF-8"),
        ('{"prompt": "' + "long " * 600 + '"}\n', "the model's context ends at 512; shorten it"),
    ],
)
def test_bad_prompt_files_are_one_sentence_and_leave_no_output(base, tmp_path, capsys, content, sentence):
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    path.write_text(content)
    assert generate("--load", str(base), "--input", str(path), "--output", str(out)) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and "Traceback" not in printed.err and not out.exists()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--load", "x", "--input", "p", "Hi"], "A prompt and --input are both given"),
        (["--load", "x", "--output", "p", "Hi"], "--output is for the answers to --input"),
        (["--load", "x", "--batch-size", "0", "Hi"], "--batch-size must be at least 1"),
        (["--load", "x", "--top-p", "2", "Hi"], "--top-p must be above 0"),
        (["--load", "x", "--lora-r", "8", "Hi"], "--lora-r"),
        (["--load", "./nowhere", "Hi"], "There is no model at ./nowhere"),
        (["--load", "x", "--input", "/nowhere.txt"], "Cannot read the prompts in /nowhere.txt"),
        (["Hi"], "No model is named"),
    ],
)
def test_wrong_flags_are_one_sentence(argv, sentence, capsys):
    assert generate(*argv) == 2
    assert sentence in capsys.readouterr().err


def test_adapters_that_cannot_be_used_are_one_sentence(base, adapter, tmp_path, capsys):
    assert generate("--load", str(adapter), "--lora-load", str(adapter), "Hi") == 2
    assert "is an adapter already" in capsys.readouterr().err
    assert generate("--load", str(base), "--lora-load", str(tmp_path), "Hi") == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    assert generate("--load", str(adapter), "Hi") == 2
    assert "The base model that" in (err := capsys.readouterr().err) and "no model at ./gone" in err
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert generate("--load", str(adapter), "Hi") == 2
    assert "names no base model; give --load BASE --lora-load" in capsys.readouterr().err
