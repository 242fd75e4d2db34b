"""The Python that a run's page and an adapter's card print, run as a person runs it: in a process without Veneer, which
must answer as the run does; and PEFT loads the folder with all that is in it."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

from veneer.cli import main
from veneer.commands.report import report
from veneer.runs.opened import open_named

pytestmark = pytest.mark.interop

# What a person may do next: ask the model, with the names that the snippet defines.
ASK = """
import json, sys, torch
assert "veneer" not in sys.modules
with torch.no_grad():
    logits = model.eval()(**tokenizer("bet:", return_tensors="pt", add_special_tokens=False)).logits
names = [model.config.id2label[i] for i in range(len(model.config.id2label))]
print(json.dumps({"logits": logits.flatten().tolist(), "names": names}))
"""
HOLDS = {"causal": "finished_run", "classifier": "finished_classifier"}


@pytest.fixture(params=HOLDS)
def run(request, tmp_path):
    return shutil.copytree(request.getfixturevalue(HOLDS[request.param]), tmp_path / "run")


def _in_a_process(code, place):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + ASK], cwd=place, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _compare(answers, run):
    opened = open_named(run)
    ids = opened.renderer.tokenizer("bet:", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        own = opened.model(ids).logits.flatten()
    torch.testing.assert_close(torch.tensor(answers["logits"]), own, rtol=1e-4, atol=1e-4)
    if opened.renderer.classes:
        assert tuple(answers["names"]) == opened.renderer.classes


def _from_page(page):
    """The Python blocks of a report's page that load the adapter, by whether they need peft."""
    blocks = [html.unescape(text) for text in re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL)]
    texts = [re.sub(r"<[^>]+>", "", block) for block in blocks]
    loading = [text for text in texts if "from_pretrained" in text]
    return {"peft" if "PeftModel" in text else "transformers": text for text in loading}, texts


def test_the_python_of_a_runs_page(run, monkeypatch, capsys):
    snippets, texts = _from_page(report(run).read_text())
    assert set(snippets) == {"peft", "transformers"}
    merge = next(text for text in texts if text.strip().startswith("veneer merge"))
    monkeypatch.setattr(sys, "argv", shlex.split(merge.strip().splitlines()[0]))
    main()
    for code in snippets.values():
        _compare(_in_a_process(code, run), run)


def test_the_python_of_a_card(run, tiny_folder, tiny_encoder):
    text = (run / "adapter" / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "PeftModel" in block)
    base = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    code = code.replace("'BASE'", repr(base)).replace("'ADAPTER'", "'adapter'")
    _compare(_in_a_process(code, run), run)


def test_peft_loads_the_folder(run):
    opened = open_named(run)
    kind = AutoPeftModelForSequenceClassification if opened.renderer.classes else AutoPeftModelForCausalLM
    more = {"num_labels": len(opened.renderer.classes)} if opened.renderer.classes else {}
    theirs = kind.from_pretrained(run / "adapter", **more).eval()
    ids = opened.renderer.tokenizer("bet:", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, opened.model(ids).logits, rtol=1e-4, atol=1e-4)
