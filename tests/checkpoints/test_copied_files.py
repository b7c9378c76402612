"""Which small files go along with a model, and which would be untrue of the new folder."""

from finerank.checkpoints.formats import hf


def test_reports_and_checksums_stay_behind(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "merge_report.json", "checksums.json", "config.json"):
        (source / name).write_text("{}")
    hf.copy_text_files(source, target)
    assert sorted(p.name for p in target.iterdir()) == ["generation_config.json", "tokenizer.json"]


def test_a_runs_prompt_template_goes_with_its_tokenizer(tmp_path):
    run, target = tmp_path / "run", tmp_path / "target"
    run.mkdir(), target.mkdir()
    (run / "tokenizer.json").write_text("{}")
    (run / "template.json").write_text('{"name": "qwen3"}')
    hf.copy_tokenizer(run, target)
    assert (target / "template.json").read_text() == '{"name": "qwen3"}'
