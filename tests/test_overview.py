"""The overview of a dataset: who is used, who is unlike the others, and a page that sorts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browsers import Browser, find_browser
from fabricate import make_config
from pages import Page

from neuromamba import overview
from neuromamba.config import Config
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.overview import LARGEST_GROUP, collect_quality, run_overview
from neuromamba.qc_rules import left_out
from neuromamba.qc_table import METRICS
from neuromamba.tables import read_table, write_table

N = 30


def write_results(folder: Path, n: int = N, **qc: float) -> Config:
    """Tables as the stages leave them: run 0 failed in the index, 1 moved, 2 has no confounds."""
    config = make_config(folder, qc={"max_mean_fd": 0.5, **qc})
    layout, rng = Layout.of(config, "toy"), np.random.default_rng(0)
    runs = [f"sub-{i:05}_task-rest" for i in range(n)]
    subjects = [run.split("_")[0] for run in runs]
    reasons = ["no <b>mask</b> & no TR", *[None] * (n - 1)]
    write_table(layout.index, pd.DataFrame({"run": runs, "subject": subjects, "reason": reasons}))
    table = pd.DataFrame({"run": runs[1:], "reason": None, "key": "k"})
    for name in METRICS:
        table[name] = rng.normal(0.2, 0.02, n - 1)
    for name in ("n_volumes", "n_spikes", "n_tokens"):
        table[name] = rng.integers(190, 210, n - 1)
    table["tsnr"] *= 300
    table.loc[0, "mean_fd"] = 0.9
    table.loc[1, ["mean_fd", "max_fd"]] = np.nan
    table.loc[5, "tsnr"] = 3.0
    table["motion_note"] = [None, "the run has no confounds", *[None] * (n - 3)]
    write_table(layout.manifest("qc", 0), table)
    bad = left_out(config, "toy")
    rows = [(runs[0], "index", reasons[0]), *((run, "qc", why) for run, why in bad.items())]
    write_table(layout.excluded, pd.DataFrame(rows, columns=["run", "stage", "reason"]))
    return config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(overview, "_group", lambda layout, runs: None)
    return write_results(tmp_path)


def make_page(config: Config) -> str:
    run_overview(config, "toy")
    return Layout.of(config, "toy").overview.read_text(encoding="utf-8")


# --- The table ----------------------------------------------------------------------------------


def test_the_table_has_every_run_and_why_it_is_left_out(config: Config) -> None:
    run_overview(config, "toy")
    table = read_table(Layout.of(config, "toy").overview.with_suffix(".tsv")).set_index("run")
    assert len(table) == N
    assert table["excluded"].notna().sum() == 3
    assert table.loc["sub-00000_task-rest", "stage"] == "index"
    assert "over qc.max_mean_fd" in table.loc["sub-00001_task-rest", "excluded"]
    assert "no confounds" in table.loc["sub-00002_task-rest", "excluded"]
    assert table.loc["sub-00006_task-rest", "outlier"] == "tsnr"
    assert table.loc["sub-00006_task-rest", "tsnr_z"] < -3.5
    assert {*METRICS, *(f"{name}_z" for name in METRICS)} <= {*table.columns}


def test_what_is_left_out_is_what_the_list_of_it_says(config: Config) -> None:
    """Its job comes first and knows the rules of now, stricter or laxer than those of before."""
    path = Layout.of(config, "toy").excluded
    listed = read_table(path)
    write_table(path, listed[listed["stage"] == "index"])
    table = collect_quality(config, "toy").table.set_index("run")
    assert list(table.index[table["reason"].notna()]) == ["sub-00000_task-rest"]
    row = pd.DataFrame([("sub-00006_task-rest", "qc", "too little signal")], columns=listed.columns)
    write_table(path, pd.concat([listed, row]))
    table = collect_quality(config, "toy").table.set_index("run")
    assert table["reason"].notna().sum() == 4
    assert table.loc["sub-00006_task-rest", "reason"] == "too little signal"


def test_a_run_that_could_not_be_measured_is_used_where_there_is_no_rule(config: Config) -> None:
    layout = Layout.of(config, "toy")
    manifest = read_table(layout.manifest("qc", 0), dtype={"reason": str}).set_index("run")
    manifest["reason"] = manifest["reason"].astype(object)
    manifest.loc["sub-00004_task-rest", "reason"] = "its store is damaged"
    write_table(layout.manifest("qc", 0), manifest.reset_index())
    run_overview(config, "toy")
    row = (
        read_table(layout.overview.with_suffix(".tsv")).set_index("run").loc["sub-00004_task-rest"]
    )
    assert pd.isna(row["excluded"])
    assert "could not be measured: its store is damaged" in row["motion_note"]


def test_what_is_missing_is_an_error_that_names_it(config: Config) -> None:
    Layout.of(config, "toy").manifest("qc", 0).unlink()
    with pytest.raises(InputError, match="qc/batch-0"):
        run_overview(config, "toy")


# --- The page -----------------------------------------------------------------------------------


def test_the_page_tells_who_is_used(config: Config) -> None:
    page = Page(make_page(config))
    assert page.open == []
    assert f"{N - 3} of {N} runs are used, of {N - 3} of {N} subjects." in page.text
    assert "3 are left out: 2 by the rules of quality, 1 by the index" in page.text
    assert "max_mean_fd 2" in page.text
    assert "The motion of 1 runs is unknown" in page.text
    assert "left out index: no <b>mask</b> & no TR" in page.text
    assert "tSNR low" in page.text


def test_the_page_can_be_used_without_a_network_and_by_ear(config: Config) -> None:
    html = make_page(config)
    page = Page(html)
    assert not re.search(r"url\(|@import|https?:", html)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe"}
        assert tag != "img" or attributes["alt"]
        assert tag != "script" or "src" not in attributes
    heads = [a for tag, a in page.tags if tag == "th" and a.get("scope") == "col"]
    assert len(heads) == len(METRICS) + 3
    assert [head["aria-sort"] for head in heads].count("ascending") == 1
    assert "<b>mask" not in html


def test_the_data_in_the_page_is_that_of_the_table(config: Config) -> None:
    found = re.search(r'id="data">(.*?)</script>', make_page(config), re.S)
    data = json.loads(found[1])
    quality = collect_quality(config, "toy")
    assert [row[0] for row in data["rows"]] == quality.table["run"].tolist()
    k = data["names"].index("tsnr")
    shown = [row[4][k] for row in data["rows"]]
    np.testing.assert_allclose(shown[1:], quality.table["tsnr"][1:], atol=0.051)
    assert shown[0] is None
    assert data["rows"][6][3] == {str(k): "low"}


def test_pages_are_linked_where_there_are_any(config: Config) -> None:
    page = Layout.of(config, "toy").qc("sub-00003_task-rest")
    page.write_text("a page")
    links = [a["href"] for tag, a in Page(make_page(config)).tags if tag == "a"]
    links = [link for link in links if link.startswith("qc/")]
    assert links == ["qc/sub-00003_task-rest.html"]
    assert (Layout.of(config, "toy").overview.parent / links[0]).exists()


def test_ten_thousand_runs_are_a_small_page(config: Config, tmp_path: Path) -> None:
    many = write_results(tmp_path, 10_000)
    html = make_page(many)
    assert len(html) < 5_000_000
    assert html.count("<tr>") < 200


def test_maps_over_runs_are_of_a_bounded_number_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read = write_results(tmp_path), []
    mask = np.zeros((12, 12, 12), dtype=bool)
    mask[3:9, 3:9, 3:9] = True
    affine = np.diag([16.0, 16, 16, 1])
    affine[:3, 3] = [-96, -110, -90]

    def read_maps(store: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        read.append(store.name)
        return np.where(mask, 500.0, np.nan), mask, affine

    monkeypatch.setattr(overview, "_read_maps", read_maps)
    layout = Layout.of(config, "toy")
    group = overview._group(layout, [f"run-{i}" for i in range(3 * LARGEST_GROUP)])
    assert group["n"] == LARGEST_GROUP
    assert len({*read}) == LARGEST_GROUP
    assert group["mean"].startswith("data:image/webp")
    assert overview._group(layout, []) is None


# --- In a browser -------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return Browser(find_browser(), tmp_path)


def dump(browser: Browser, page: Path, fragment: str = "") -> str:
    """The page as the browser has it after its scripts have run."""
    return browser.run(page, "--dump-dom", fragment=fragment)


def column(html: str, k: int) -> list[str]:
    """The k-th cell of each row, as text; 0 is the run."""
    body = re.search(r"<tbody>(.*?)</tbody>", html, re.S)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [re.sub(r"<[^>]*>", "", row[k]) for row in cells]


def clicked(html: str, script: str) -> str:
    return html.replace("</body>", f"<script>{script}</script></body>")


def test_a_click_on_a_heading_sorts_and_another_turns_the_order(
    config: Config, browser: Browser, tmp_path: Path
) -> None:
    page = tmp_path / "clicked.html"
    click = "document.querySelector('[data-key=\"tsnr\"]').click();"
    expected = collect_quality(config, "toy").table.set_index("run")["tsnr"]
    for times, ascending, word in ((1, True, "ascending"), (2, False, "descending")):
        page.write_text(clicked(make_page(config), click * times))
        html = dump(browser, page)
        shown = expected.round(1)
        order = shown.sort_values(ascending=ascending, na_position="last", kind="stable").index
        assert column(html, 0) == order.tolist()
        assert column(html, 0) != expected.index.tolist()
        assert re.search(rf'aria-sort="{word}"><button[^>]*data-key="tsnr"', html)
        head = re.search(r"<thead>.*?</thead>", html, re.S)[0]
        assert head.count('aria-sort="none"') == len(METRICS) + 2


def test_search_and_the_address_choose_rows(config: Config, browser: Browser) -> None:
    make_page(config)
    page = Layout.of(config, "toy").overview
    html = dump(browser, page, "#find=sub-00006&sort=mean_fd&order=descending")
    assert column(html, 0) == ["sub-00006_task-rest"]
    k = 2 + list(METRICS).index("tsnr")
    assert column(html, k)[0].endswith("↓")
    html = dump(browser, page, "#show=out&sort=run&order=ascending")
    assert column(html, 0) == [f"sub-0000{i}_task-rest" for i in range(3)]
    assert column(html, 1)[0].startswith("left out index: no &lt;b&gt;mask")


def test_rows_are_the_same_with_and_without_a_script(config: Config, browser: Browser) -> None:
    plain = make_page(config)
    html = dump(browser, Layout.of(config, "toy").overview)
    for k in range(len(METRICS) + 3):
        assert column(html, k) == [" ".join(cell.split()) for cell in column(plain, k)]
