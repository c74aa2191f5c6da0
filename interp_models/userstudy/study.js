"use strict";
(() => {
  const one = selector => document.querySelector(selector);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const data = JSON.parse(one("#data").textContent);
  let state = null; // the participant's answers so far
  let began = 0; // when the trial on the screen was shown
  let kept = true; // whether the browser keeps answers
  let asked = 0; // the number whose answers of before were shown to its participant

  const place = participant => `interp_models ${data.study} ${participant}`;
  const plan = () => data.plan[(state.participant - 1) % data.plan.length];
  const next = () => plan().find(id => !(id in state.answers));

  function warn(text) {
    one("#warning").textContent = text;
    one("#warning").hidden = false;
  }

  function stored(participant) {
    try {
      return JSON.parse(localStorage.getItem(place(participant)));
    } catch {
      return null; // the browser keeps nothing, see `keep`
    }
  }

  function load(participant) {
    const found = stored(participant);
    if (found) return found;
    const now = new Date().toISOString();
    return { schema_version: 1, study: data.study, task: data.task, participant, begun: now, saved: null, answers: {} };
  }

  function keep() {
    const before = stored(state.participant); // another tab may have added answers
    if (before) state.answers = { ...before.answers, ...state.answers };
    try {
      localStorage.setItem(place(state.participant), JSON.stringify(state));
    } catch {
      kept = false;
      warn("This browser cannot keep your answers. Please leave this page open until you have saved them to a file.");
    }
  }

  addEventListener("beforeunload", event => {
    if (state && !state.saved && (!kept || !next())) event.preventDefault();
  });

  function figures(shown) {
    return shown.map(({ picture, caption }) =>
      make("figure", {}, make("img", { src: data.pictures[picture], alt: caption || "picture" }), make("figcaption", {}, caption)),
    );
  }

  function field(question) {
    const set = make("fieldset", { "data-key": question.key }, make("legend", {}, question.text));
    if (!question.options.length) {
      const attributes = { type: "number", name: question.key, min: 0, max: 100, step: 1, required: "", "aria-label": question.text };
      set.append(make("input", attributes));
      return set;
    }
    const choices = question.options.map((option, value) =>
      make("label", {}, make("input", { type: "radio", name: question.key, value }), " ", option),
    );
    set.append(make("div", { class: "choices" }, ...choices));
    return set;
  }

  function show() {
    const id = next();
    one("#start").hidden = true;
    one("#trial").hidden = !id;
    one("#end").hidden = Boolean(id);
    if (!id) return one("#end").focus();
    const trial = data.trials[id];
    const done = plan().filter(other => other in state.answers).length;
    one("#progress").textContent = `${done + 1} of ${plan().length}`;
    one("#examples").hidden = !trial.examples.length;
    one("#examples .pictures").replaceChildren(...figures(trial.examples));
    one("#shown .pictures").replaceChildren(...figures(trial.pictures));
    one("#questions").replaceChildren(...trial.questions.map(field));
    one("#missing").textContent = "";
    scrollTo(0, 0);
    began = performance.now();
  }

  one("#start").addEventListener("submit", event => {
    event.preventDefault();
    const participant = Number(one("#participant").value);
    const before = stored(participant);
    if (before && asked !== participant && Object.keys(before.answers).length) {
      asked = participant;
      warn(`Participant ${participant} has begun in this browser. If this is you, press “Begin” again to go on.`);
      return;
    }
    one("#warning").hidden = true;
    state = load(participant);
    keep();
    show();
  });

  one("#trial").addEventListener("submit", event => {
    event.preventDefault();
    const id = next();
    const given = {};
    for (const question of data.trials[id].questions) {
      const value = new FormData(one("#trial")).get(question.key);
      if (value === null || value === "") {
        one("#missing").textContent = "Please answer every question.";
        return;
      }
      given[question.key] = Number(value);
    }
    state.answers[id] = { given, seconds: Math.round(performance.now() - began) / 1000 };
    keep();
    show();
  });

  one("#save").addEventListener("click", () => {
    state.saved = new Date().toISOString();
    keep();
    const url = URL.createObjectURL(new Blob([JSON.stringify(state, null, 1)], { type: "application/json" }));
    const name = `${data.task}-${data.study}-${String(state.participant).padStart(3, "0")}.json`;
    const link = make("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    one("#saved").textContent = `The file is called ${name}.`;
  });

  const number = new URLSearchParams(location.search).get("participant");
  if (number) one("#participant").value = number;
})();
