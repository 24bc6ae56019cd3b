// The comparison page: curves of all jobs in the same charts, pictures of all jobs by one slider.
"use strict";

(() => {
  const { byId, readData } = Losslab;
  const NUM_COLOURS = 7;
  const share = () => [0, 1];

  let drawing = readData("drawing");
  const { thresholds } = drawing;
  // The thresholds of criteria that do not judge are not drawn.
  const judges = (name) => drawing.criteria.includes(name);
  const limit = (threshold, criterion) => () => (judges(criterion) ? [thresholds[threshold]] : []);
  const settings = {
    train_pixel_accuracy: {
      range: share,
      band: judges("accuracy_in_range")
        ? () => [thresholds.min_accuracy, thresholds.max_accuracy]
        : undefined,
      marked: () => drawing.background_shares,
    },
    val_foreground_recall: {
      range: share,
      marked: limit("min_foreground_recall", "not_mode_collapsed"),
    },
    val_foreground_iou: { range: (_, low, high) => [0, Math.max(high, 0.1) * 1.05] },
    painted_share: {
      range: (_, low, high) => [0, Math.min(1, Math.max(high, ...drawing.chance.foreground) * 1.1)],
      marked: () => drawing.chance.foreground,
    },
    val_foreground_ap: { range: Charts.fromZero, marked: () => drawing.chance.foreground },
    val_colour_ap: { range: Charts.fromZero, marked: () => drawing.chance.colour },
    min_kl: { marked: limit("min_kl_per_dimension", "kl_per_dimension") },
  };

  const curves = drawing.jobs.map(({ label }, index) => ({
    label,
    colour: index % NUM_COLOURS,
    dash: Math.floor(index / NUM_COLOURS),
  }));
  const dataOf = (name) => Charts.join(drawing.jobs.map((job) => job.curves[name]));
  const charts = [...document.querySelectorAll("[data-panel]")].map((panel) => {
    const name = panel.dataset.panel;
    const options = { curves, legend: curves.length <= 6, ...settings[name] };
    return { name, chart: Charts.lines(panel, options, dataOf(name)) };
  });

  // Pointing at a row of a table highlights its curves.
  const highlight = (event) => {
    const row = event.type.endsWith("out") ? null : event.target.closest("[data-series]");
    for (const { chart } of charts) chart.highlight(row ? Number(row.dataset.series) : null);
  };
  for (const table of [byId("criteria"), byId("measures")]) {
    for (const kind of ["mouseover", "mouseout", "focusin", "focusout"]) {
      table.addEventListener(kind, highlight);
    }
  }

  // The slider covers all epochs with a picture of any job. A job without a picture of an epoch
  // shows its last earlier one.
  const slider = byId("epoch-slider");
  let pictures = {};
  let epochs = [];

  const newest = (list, epoch) => list.findLast((e) => e <= epoch) ?? list[0];
  const urlOf = (jobId, epoch) => `${Losslab.root}/jobs/${jobId}/reconstructions/${epoch}.png`;

  function showPictures() {
    const epoch = epochs[slider.valueAsNumber];
    if (epoch === undefined) return;
    slider.disabled = false;
    byId("epoch-shown").textContent = `epoch ${epoch}`;
    slider.setAttribute("aria-valuetext", `epoch ${epoch}`);
    for (const figure of document.querySelectorAll(".pictures figure")) {
      const { jobId } = figure.dataset;
      const shown = newest(pictures[jobId], epoch);
      if (shown === undefined) continue;
      const image = figure.querySelector("img");
      const url = urlOf(jobId, shown);
      figure.querySelector(".shown").textContent = `epoch ${shown}`;
      // A picture that failed to load is requested again.
      const isBroken = image.complete && image.naturalWidth === 0;
      if (image.getAttribute("src") === url && !isBroken) continue;
      image.hidden = false;
      image.src = url;
    }
  }

  // Preload only for visible jobs: with a hundred jobs there would be many pictures.
  function preloadNeighbours() {
    for (const figure of document.querySelectorAll(".pictures figure")) {
      const { top, bottom } = figure.getBoundingClientRect();
      if (bottom < 0 || top > innerHeight) continue;
      for (const near of [-1, 1]) {
        const epoch = epochs[slider.valueAsNumber + near];
        const shown = epoch === undefined ? undefined : newest(pictures[figure.dataset.jobId], epoch);
        if (shown !== undefined) new Image().src = urlOf(figure.dataset.jobId, shown);
      }
    }
  }

  function takePictures() {
    const wasLatest = slider.valueAsNumber >= epochs.length - 1;
    pictures = readData("pictures");
    epochs = [...new Set(Object.values(pictures).flat())].sort((a, b) => a - b);
    slider.max = Math.max(0, epochs.length - 1);
    if (wasLatest) slider.value = epochs.length - 1;
    showPictures();
  }

  slider.addEventListener("input", () => {
    showPictures();
    preloadNeighbours();
  });
  let shown = JSON.stringify(drawing);
  Losslab.listeners.push(() => {
    drawing = readData("drawing");
    const text = JSON.stringify(drawing);
    if (text !== shown) for (const { name, chart } of charts) chart.setData(dataOf(name));
    shown = text;
    takePictures();
  });
  takePictures();
  // The curves are drawn after this task has ended and are visible after the next frame.
  requestAnimationFrame(() => setTimeout(() => performance.mark("interactive")));
})();
