"""The page of a study in Chromium: what participants click is what is read back."""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp_models.userstudy import TASKS
from studies.simulated_people import BEGIN, answers_to, fill_in
from tests import drive_page
from tests.conftest import Script, copy_run
from tests.drive_page import Session, browser
from tests.userstudy.test_studies import PLAN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        drive_page.CHROMIUM is None or drive_page.CHROMEDRIVER is None,
        reason="needs Chromium: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def run(cnn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(cnn_run, tmp_path_factory.mktemp("study") / "run")


@pytest.fixture
def session() -> Iterator[Session]:
    with browser() as session:
        yield session


def page_of(run: Path, task: str, script: Script, *changes: str) -> tuple[Path, dict[str, Any]]:
    outcome = script("evaluate", run, *PLAN, f"userstudy={task}", *changes)
    assert outcome.code == 0, outcome.err
    page = Path(outcome.out.rpartition("study: ")[2].strip())
    return page, json.loads(page.with_name("study.json").read_text())


def js(session: Session, script: str, *arguments: Any) -> Any:
    return session("POST", "/execute/sync", {"script": script, "args": list(arguments)})


def opened(session: Session, page: Path, participant: int = 1) -> None:
    session.open(f"{page.resolve().as_uri()}?participant={participant}")


@pytest.mark.parametrize("task", TASKS.names())
def test_what_is_clicked_is_read_back(run: Path, task: str, script: Script, tmp_path: Path, session: Session) -> None:
    """Three participants, each of whom closes the page halfway; the known answers are in the files and are read."""
    page, study = page_of(run, task, script)
    session.protocol("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for number in (1, 2, 15):  # the plan has 14
        fill_in(session, page, study, number, "gradcam", tmp_path)
        name = f"{task}-{study['study']}-{number:03d}.json"
        saved = json.loads((tmp_path / name).read_text())
        draw = np.random.default_rng(number)
        expected = {
            trial: answers_to(study, trial, "gradcam", draw)
            for trial in study["plan"][(number - 1) % len(study["plan"])]
        }
        assert {trial: own["given"] for trial, own in saved["answers"].items()} == expected
        assert set(saved) == {"schema_version", "study", "task", "participant", "begun", "saved", "answers"}
    outcome = script("evaluate", run, "userstudy=read", f"answers={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert f"{task}: 3 participants" in outcome.out
    errors = [entry for entry in session.log("browser") if "beforeunload" not in entry["message"]]
    assert errors == []


def test_nobody_begins_without_consent_and_number(run: Path, script: Script, tmp_path: Path, session: Session) -> None:
    text = tmp_path / "consent.txt"
    text.write_text("You can stop <b>at any time</b>.")
    page, _ = page_of(run, "quality", script, f"study.consent={text}")
    opened(session, page)
    assert js(session, "return document.querySelector('.consent').textContent") == "You can stop <b>at any time</b>."
    click = "document.querySelector('#start button').click(); return document.querySelector('#trial').hidden"
    assert js(session, click) is True
    js(session, "document.querySelector('#agree').click(); document.querySelector('#participant').value = ''")
    assert js(session, click) is True
    js(session, "document.querySelector('#participant').value = '3'")
    session("POST", "/execute/async", {"script": BEGIN.replace("if (agree) agree.click();", ""), "args": []})
    assert js(session, "return document.querySelector('#trial').hidden") is False


def test_every_question_must_be_answered(run: Path, script: Script, session: Session) -> None:
    page, _ = page_of(run, "correctness", script)
    opened(session, page)
    session("POST", "/execute/async", {"script": BEGIN, "args": []})
    state = "return [document.querySelector('#progress').textContent, document.querySelector('#missing').textContent]"
    next_one = "document.querySelector('#trial button').click();" + state
    first, says = js(session, next_one)
    assert (first[:4], says) == ("1 of", "Please answer every question.")
    js(session, "document.querySelector('input[name=right]').click()")
    assert js(session, next_one) == [first, "Please answer every question."]
    js(session, "document.querySelector('input[name=sure]').click()")
    assert js(session, next_one)[0][:4] == "2 of"


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("task", ["simulation", "agreement"])
def test_it_fits_the_screen_and_asks_for_nothing(
    run: Path, task: str, width: int, script: Script, session: Session
) -> None:
    page, _ = page_of(run, task, script)
    session.protocol(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
    )
    opened(session, page)
    session("POST", "/execute/async", {"script": BEGIN, "args": []})
    found = js(
        session,
        "return [document.documentElement.scrollWidth - document.documentElement.clientWidth,"
        " [...document.images].filter(image => !image.naturalWidth).length, document.images.length]",
    )
    assert found[:2] == [0, 0]
    assert found[2] >= 3 if task == "agreement" else found[2] >= 1
    events = [json.loads(entry["message"])["message"] for entry in session.log("performance")]
    asked = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "data:", "chrome")) for url in asked)
    if "SCREENSHOTS" in os.environ:
        path = Path(os.environ["SCREENSHOTS"]) / f"{task}-{width}.png"
        path.write_bytes(base64.b64decode(session("GET", "/screenshot")))


def test_a_number_that_has_begun_is_asked_about(run: Path, script: Script, session: Session) -> None:
    page, _ = page_of(run, "quality", script)
    opened(session, page)
    session("POST", "/execute/async", {"script": BEGIN, "args": []})
    js(session, "document.querySelector('input[name=rating]').click()")
    js(session, "document.querySelector('#trial button').click()")
    opened(session, page)
    click = "document.querySelector('#start button').click(); return document.querySelector('#warning').textContent"
    session.until(f"{click}.includes('Participant 1 has begun in this browser')")
    assert js(session, "return document.querySelector('#trial').hidden") is True
    session("POST", "/execute/async", {"script": BEGIN, "args": []})
    assert js(session, "return document.querySelector('#progress').textContent")[:4] == "2 of"


def test_a_browser_that_keeps_nothing_says_so(run: Path, script: Script, session: Session) -> None:
    page, _ = page_of(run, "quality", script)
    session.protocol(
        "Page.addScriptToEvaluateOnNewDocument",
        source="Storage.prototype.setItem = () => { throw new Error('full'); };",
    )
    opened(session, page)
    session("POST", "/execute/async", {"script": BEGIN, "args": []})
    assert "cannot keep your answers" in js(session, "return document.querySelector('#warning').textContent")
    js(session, "addEventListener('beforeunload', event => event.stopImmediatePropagation(), true)")
