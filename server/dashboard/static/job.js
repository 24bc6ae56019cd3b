// The page of one job: its curves get a new point with each epoch.
"use strict";

(() => {
  const { byId, readData } = Losslab;
  const jobId = document.body.dataset.jobId;
  const drawing = readData("drawing");
  const { thresholds } = drawing;
  const share = () => [0, 1];

  const columns = drawing.curves;
  // Curves that are computed from the columns.
  const derived = {
    train_painted: () => invert(columns.train_background_share),
    val_painted: () => invert(columns.val_background_share),
    kl: () => [drawing.kl.epochs, drawing.kl.values.map((row) => row.reduce((a, b) => a + b, 0))],
  };
  const invert = ([epochs, shares]) => [epochs, shares.map((share) => share === null ? null : 1 - share)];
  const pick = (...names) => Charts.join(names.map((name) => derived[name]?.() ?? columns[name]));
  const last = (name) => columns[name][1].findLast((value) => value !== null);
  const panel = (name) => document.querySelector(`[data-panel=${name}]`);
  const heatData = () => {
    const { epochs, values } = drawing.kl;
    const dimensions = Array.from({ length: drawing.num_dimensions }, (_, d) => d);
    return [epochs, ...dimensions.map((d) => values.map((row) => row[d] ?? null))];
  };

  // The data set is not known before the job has started.
  let backgroundShare = readData("background-share");
  let mostInformation = readData("most-information");
  const trueShare = () => {
    const known = last("val_foreground_share") ?? (backgroundShare === null ? null : 1 - backgroundShare);
    return known === null ? [] : [known];
  };

  const panels = [
    {
      names: ["train_loss", "train_recon_loss", "train_kl_loss", "val_loss", "val_recon_loss"],
      draw: (data) =>
        Charts.lines(
          panel("loss"),
          {
            curves: [
              { label: "total" },
              { label: "reconstruction" },
              { label: "KL" },
              { label: "val. total", colour: 0, dash: 1 },
              { label: "val. reconstruction", colour: 1, dash: 1 },
            ],
          },
          data,
        ),
    },
    {
      names: ["train_pixel_accuracy", "val_pixel_accuracy"],
      draw: (data) =>
        Charts.lines(
          panel("accuracy"),
          {
            curves: [{ label: "training" }, { label: "validation", dash: 1 }],
            range: share,
            band: () => [thresholds.min_accuracy, thresholds.max_accuracy],
            marked: () => (backgroundShare === null ? [] : [backgroundShare]),
          },
          data,
        ),
    },
    {
      names: [
        "val_foreground_recall",
        "val_foreground_iou",
        "val_foreground_precision",
        "train_foreground_recall",
      ],
      draw: (data) =>
        Charts.lines(
          panel("foreground"),
          {
            curves: [
              { label: "val. recall" },
              { label: "val. IoU" },
              { label: "val. precision" },
              { label: "training recall", colour: 0, dash: 1 },
            ],
            range: share,
            marked: () => [thresholds.min_foreground_recall],
          },
          data,
        ),
    },
    {
      names: ["val_painted", "train_painted"],
      draw: (data) =>
        Charts.lines(
          panel("painted"),
          {
            curves: [{ label: "validation" }, { label: "training", colour: 0, dash: 1 }],
            range: (_, low, high) => [0, Math.min(1, Math.max(high, ...trueShare(), 0.01) * 1.2)],
            marked: trueShare,
          },
          data,
        ),
    },
    {
      names: ["val_foreground_ap", "val_colour_ap", "val_matched_iou"],
      draw: (data) =>
        Charts.lines(
          panel("ranking"),
          {
            curves: [
              { label: "foreground AP" },
              { label: "colour AP" },
              { label: "IoU at the true share" },
            ],
            range: Charts.fromZero,
            marked: () =>
              [
                [last("val_foreground_share"), "--curve-0"],
                [last("val_colour_prevalence"), "--curve-1"],
              ].filter(([value]) => value !== undefined),
          },
          data,
        ),
    },
    {
      names: ["val_mutual_information", "kl"],
      draw: (data) =>
        Charts.lines(
          panel("information"),
          {
            curves: [{ label: "mutual information" }, { label: "KL", colour: 0, dash: 1 }],
            range: (_, low, high) => [Math.min(low, 0), Math.max(high, 0.1) * 1.05],
            marked: () => (mostInformation === null ? [] : [mostInformation]),
            errors: () => columns.val_mutual_information_error,
          },
          data,
        ),
    },
    {
      names: ["beta", "learning_rate"],
      draw: (data) =>
        Charts.lines(
          panel("schedule"),
          {
            curves: [{ label: "β" }, { label: "learning rate", scale: "right", dash: 1 }],
            range: (_, low, high) => [0, Math.max(high, 0.001) * 1.05],
            rightRange: (_, low, high) => [0, Math.max(high, 1e-6) * 1.05],
          },
          data,
        ),
    },
  ];
  for (const { names, draw, ...rest } of panels.splice(0)) {
    panels.push({ names, chart: draw(pick(...names)), ...rest });
  }
  const heatMap = Charts.heat(panel("kl"), { limit: thresholds.min_kl_per_dimension }, heatData());

  Losslab.listeners.push(() => {
    const known = backgroundShare;
    backgroundShare = readData("background-share");
    mostInformation = readData("most-information");
    if (backgroundShare === known) return;
    for (const { chart } of panels) chart.redraw();
  });

  // An epoch that is trained again after a resume replaces its first run.
  function place(epochs, lists, epoch, values) {
    let index = epochs.length;
    while (index > 0 && epochs[index - 1] >= epoch) index -= 1;
    const isKnown = epochs[index] === epoch;
    epochs.splice(index, isKnown ? 1 : 0, epoch);
    lists.forEach((list, i) => list.splice(index, isKnown ? 1 : 0, values[i]));
  }

  function addEpoch(row) {
    for (const [name, [epochs, values]] of Object.entries(columns)) {
      place(epochs, [values], row.epoch, [row[name] ?? null]);
    }
    place(drawing.kl.epochs, [drawing.kl.values], row.epoch, [row.val_kl_per_dimension]);
    for (const { names, chart } of panels) chart.setData(pick(...names));
    heatMap.setData(heatData());
    document.body.dataset.lastEpoch = row.epoch;
  }

  // The API's event stream. The browser reconnects automatically with the id of the last event; if
  // it gives up, `poll` reconnects.
  let stream = null;
  let lastEvent = drawing.after;
  let timer = 0;

  const isLive = () => ["queued", "running", "paused"].includes(byId("state").dataset.status);
  const refreshSoon = () => {
    clearTimeout(timer);
    timer = setTimeout(Losslab.refresh, 300);
  };

  function listen() {
    if (stream) return;
    stream = new EventSource(`${Losslab.root}/jobs/${jobId}/events?after=${lastEvent}`);
    for (const kind of drawing.event_kinds) {
      stream.addEventListener(kind, (message) => {
        lastEvent = Number(message.lastEventId);
        const event = JSON.parse(message.data);
        if (kind === "epoch") addEpoch(event.data);
        else if (!drawing.file_kinds.includes(kind)) Losslab.announce(`${event.kind}: ${event.message}`);
        refreshSoon();
      });
    }
    stream.addEventListener("open", () => Losslab.showConnection(false));
    stream.addEventListener("end", closeStream);
    stream.addEventListener("error", () => {
      Losslab.showConnection(true);
      if (stream?.readyState === EventSource.CLOSED) closeStream();
    });
  }

  function closeStream() {
    stream?.close();
    stream = null;
    refreshSoon();
  }

  // The page of an ended job also polls, but less often: the job may be resumed elsewhere.
  const ENDED_SECONDS = 15;
  let polledAt = performance.now();

  async function poll() {
    const pause = isLive() ? Losslab.RETRY_SECONDS : ENDED_SECONDS;
    if (document.hidden || performance.now() - polledAt < pause * 1000) return;
    polledAt = performance.now();
    if ((await Losslab.refresh()) && isLive()) listen();
  }

  // Browsers limit the connections per server, so a hidden page closes its stream.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      stream?.close();
      stream = null;
    } else if (isLive()) {
      listen();
    }
  });

  if (isLive()) listen();
  setInterval(poll, 500);
})();
