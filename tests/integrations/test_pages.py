"""What the pages on the service and on components show runs, and gives the answers they show."""

import re

import pytest

from folders import ROOT

MODULES = {
    "haystack": ["haystack"],
    "langchain": ["langchain_core", "langchain_classic"],
    "llama_index": ["llama_index.core"],
    "serving": [],
    "sentence_transformers": [],
}


@pytest.mark.parametrize(("page", "modules"), MODULES.items(), ids=MODULES)
def test_python_in_the_page(page, modules, service, monkeypatch, capsys):
    for module in modules:
        pytest.importorskip(module, reason="make test-integrations installs it")
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code = "\n".join(blocks).replace("http://127.0.0.1:8000", service.url)
    assert (service.url in code) == (page != "sentence_transformers")
    code = re.sub(r"(?m)^(reranker\.\w+\(.*\))", r"print(\1)", code)
    exec(compile(code, page, "exec"), {})  # the project's own page
    (shown,) = re.findall(r"# (timber|\[\{\"corpus_id\": 1)", code)
    assert capsys.readouterr().out.startswith(shown.replace('"', "'"))
