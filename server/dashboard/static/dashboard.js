// Shared by all pages: local times, live parts, the job form. The pages also work without it.
"use strict";

const Losslab = (() => {
  const RETRY_SECONDS = 2;
  const seen = new Map(); // the last HTML from the server of each live part
  const listeners = [];
  // The path below which a reverse proxy serves this service; empty at the root of its host.
  const root = document.body.dataset.root;
  let isRefreshing = false;

  const byId = (id) => document.getElementById(id);

  function readData(id, root = document) {
    const element = root.getElementById(id);
    return element ? JSON.parse(element.textContent) : null;
  }

  // The server sends times in UTC; they are shown in the reader's time zone.
  const today = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
  const otherDay = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

  function localiseTimes(root) {
    for (const element of root.querySelectorAll("time:not([data-age])")) {
      const moment = new Date(element.dateTime);
      const isToday = moment.toDateString() === new Date().toDateString();
      element.title = moment.toLocaleString(undefined, { dateStyle: "full", timeStyle: "long" });
      element.textContent = (isToday ? today : otherDay).format(moment);
    }
  }

  function rememberLiveParts() {
    for (const part of document.querySelectorAll("[data-live]")) seen.set(part.id, part.outerHTML);
  }

  const focusable = "a[href], button, input, select, summary, [tabindex]";

  // Replaces a part by the server's newest version and keeps the focus and the marked boxes.
  function replacePart(old, fresh) {
    const isFollowing =
      "follow" in old.dataset && old.scrollTop + old.clientHeight >= old.scrollHeight - 8;
    for (const name of old.getAttributeNames()) {
      if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const name of fresh.getAttributeNames()) old.setAttribute(name, fresh.getAttribute(name));
    const before = [...old.querySelectorAll(focusable)];
    const focused = before.indexOf(document.activeElement);
    const marked = new Set(before.filter((box) => box.checked).map((box) => box.value));
    old.replaceChildren(...document.adoptNode(fresh).childNodes);
    const after = [...old.querySelectorAll(focusable)];
    for (const box of after) if (marked.has(box.value) && box.type === "checkbox") box.checked = true;
    if (focused >= 0) after[Math.min(focused, after.length - 1)]?.focus({ preventScroll: true });
    localiseTimes(old);
    if (isFollowing) old.scrollTop = old.scrollHeight;
  }

  function updateParts(page) {
    for (const fresh of page.querySelectorAll("[data-live]")) {
      const html = fresh.outerHTML;
      const old = byId(fresh.id);
      // The page without jobs has other parts, so the first job needs a reload.
      if (!old && !document.activeElement?.closest("form")) location.reload();
      if (!old || seen.get(fresh.id) === html) continue;
      seen.set(fresh.id, html);
      // If the part still has the same rows, by their ids, only changed rows are replaced.
      const rows = [...fresh.children];
      const hasSameRows =
        rows.length > 0 &&
        rows.length === old.children.length &&
        rows.every((row, index) => row.id && row.id === old.children[index].id);
      if (hasSameRows) {
        for (const row of rows) {
          if (seen.get(row.id) === row.outerHTML) continue;
          seen.set(row.id, row.outerHTML);
          replacePart(byId(row.id), row);
        }
      } else {
        replacePart(old, fresh);
      }
    }
  }

  function showConnection(isLost) {
    const text = isLost ? "The server does not answer. This page tries again automatically." : "";
    if (byId("connection").textContent !== text) byId("connection").textContent = text;
  }

  function announce(text) {
    byId("announcement").textContent = text;
  }

  // Loads this page again and shows the changes. Returns whether the server answered.
  async function refresh() {
    if (isRefreshing) return true;
    isRefreshing = true;
    try {
      const answer = await fetch(location.href, { headers: { "Losslab-Refresh": "1" } });
      if (answer.redirected || answer.status === 404) location.reload();
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      updateParts(page);
      document.body.dataset.refreshSeconds = page.body.dataset.refreshSeconds ?? "";
      showConnection(false);
      for (const listener of listeners) listener();
      return true;
    } catch {
      showConnection(true);
      return false;
    } finally {
      isRefreshing = false;
    }
  }

  // Runs until the server says that nothing will change any more.
  async function keepFresh() {
    for (;;) {
      const seconds = Number(document.body.dataset.refreshSeconds);
      if (!seconds) return;
      await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
      if (!document.hidden) await refresh();
    }
  }

  // Updates the resolved configuration after each input.
  function followForm(form) {
    const preview = byId("preview");
    // Not by `dataset`: the form has a field of that name.
    const address = form.getAttribute("data-preview");
    let asked = null;
    let timer = 0;
    const askIn = (milliseconds) => {
      clearTimeout(timer);
      timer = setTimeout(ask, milliseconds);
    };

    // Abort the previous request: its answer must not replace the answer to the newest input.
    async function ask() {
      asked?.abort();
      asked = new AbortController();
      const { signal } = asked;
      const query = new URLSearchParams(new FormData(form));
      for (const [key, value] of [...query]) if (!value) query.delete(key);
      try {
        const answer = await fetch(`${address}?${query}`, { signal });
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        const fresh = page.getElementById("preview");
        if (!fresh) throw new Error(`status ${answer.status}`);
        preview.replaceChildren(...document.adoptNode(fresh).childNodes);
        for (const input of page.querySelectorAll(".overrides input")) {
          form.elements[input.name].placeholder = input.placeholder;
        }
      } catch {
        if (signal.aborted) return;
        showFailure();
        askIn(RETRY_SECONDS * 1000);
      }
    }

    function showFailure() {
      const text = "The server does not send the preview. This page tries again automatically.";
      if (preview.textContent === text) return;
      const problem = document.createElement("p");
      problem.className = "problem";
      problem.textContent = text;
      preview.replaceChildren(problem);
    }

    form.addEventListener("input", () => askIn(200));
  }

  // Jobs can be marked on several pages and compared together, so the marks are kept per tab.
  const MARKS = "losslab-marks";

  function readMarks() {
    try {
      return new Set(JSON.parse(sessionStorage.getItem(MARKS) ?? "[]"));
    } catch {
      return new Set(); // the browser stores nothing: only the marks of this page count
    }
  }

  function keepMarks(marks) {
    try {
      sessionStorage.setItem(MARKS, JSON.stringify([...marks]));
    } catch {}
  }

  function followMarks() {
    const form = byId("compare");
    if (!form) return;
    const marks = readMarks();
    const most = Number(form.dataset.maxJobs);
    const show = () => {
      const boxes = [...document.querySelectorAll("input[name=job_id]")];
      for (const box of boxes) box.checked = marks.has(box.value);
      const isTooMany = marks.size > most;
      byId("num-chosen").textContent = marks.size ? `${marks.size} marked` : "the marked jobs";
      byId("too-many").textContent = isTooMany ? `${most} can be compared at once.` : "";
      byId("compare-marked").disabled = marks.size === 0 || isTooMany;
      byId("unmark").hidden = marks.size === 0;
    };
    document.addEventListener("change", ({ target }) => {
      if (target.name !== "job_id") return;
      if (target.checked) marks.add(target.value);
      else marks.delete(target.value);
      keepMarks(marks);
      show();
    });
    byId("unmark").addEventListener("click", () => {
      marks.clear();
      keepMarks(marks);
      show();
    });
    // In the order in which the jobs were marked, on any page.
    form.addEventListener("formdata", ({ formData }) => {
      formData.delete("job_id");
      for (const jobId of marks) formData.append("job_id", jobId);
    });
    listeners.push(show);
    show();
  }

  function start() {
    rememberLiveParts();
    localiseTimes(document);
    for (const part of document.querySelectorAll("[data-follow]")) part.scrollTop = part.scrollHeight;
    for (const form of document.querySelectorAll("form[data-preview]")) followForm(form);
    followMarks();
    for (const form of document.querySelectorAll("[data-instant]")) {
      form.addEventListener("change", () => form.requestSubmit());
    }
    // Disable the buttons: a second click would send the change twice.
    document.addEventListener("submit", (event) => {
      if (event.target.method !== "post") return;
      setTimeout(() => event.target.querySelectorAll("button").forEach((b) => (b.disabled = true)));
    });
    keepFresh();
  }

  start();
  return { RETRY_SECONDS, announce, byId, listeners, readData, refresh, root, showConnection };
})();
