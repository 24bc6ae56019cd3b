// The page of one job: curves that grow with each epoch, and the viewer of its pictures.
"use strict";

(() => {
  const { byId, readData } = Losslab;
  const jobId = document.body.dataset.jobId;
  const drawing = readData("drawing");
  const { thresholds } = drawing;
  const share = () => [0, 1];

  const columns = drawing.curves;
  const pick = (...names) => Charts.join(names.map((name) => columns[name]));
  const panel = (name) => document.querySelector(`[data-panel=${name}]`);
  const heatData = () => {
    const { epochs, values } = drawing.kl;
    const num = values.length ? values.at(-1).length : 1;
    return [epochs, ...Array.from({ length: num }, (_, d) => values.map((row) => row[d] ?? null))];
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
            marked: () => (drawing.background_share ? [drawing.background_share] : []),
          },
          data,
        ),
    },
    {
      names: ["val_foreground_recall", "val_foreground_iou", "train_foreground_recall"],
      draw: (data) =>
        Charts.lines(
          panel("foreground"),
          {
            curves: [
              { label: "val. recall" },
              { label: "val. IoU" },
              { label: "training recall", colour: 0, dash: 1 },
            ],
            range: share,
            marked: () => [thresholds.min_foreground_recall],
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
  let heatMap = Charts.heat(panel("kl"), { limit: thresholds.min_kl_per_dimension }, heatData());

  // An epoch that runs again after a resume takes the place of its first run.
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
    const numBefore = drawing.kl.values.at(-1)?.length;
    place(drawing.kl.epochs, [drawing.kl.values], row.epoch, [row.val_kl_per_dimension]);
    for (const { names, chart } of panels) chart.setData(pick(...names));
    if (numBefore === row.val_kl_per_dimension.length) {
      heatMap.setData(heatData());
    } else {
      heatMap.plot.destroy();
      heatMap = Charts.heat(panel("kl"), { limit: thresholds.min_kl_per_dimension }, heatData());
    }
    document.body.dataset.lastEpoch = row.epoch;
  }

  // The API's own event stream. The browser comes back by itself, with the id of the last event it
  // saw; where it gives up, this does.
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
    stream = new EventSource(`/jobs/${jobId}/events?after=${lastEvent}`);
    const kinds = "queued running paused succeeded failed cancelled cancel_requested pause_requested";
    for (const kind of [...kinds.split(" "), "resumed", "epoch", "checkpoint", "warning"]) {
      stream.addEventListener(kind, (message) => {
        lastEvent = Number(message.lastEventId);
        const event = JSON.parse(message.data);
        if (kind === "epoch") addEpoch(event.data);
        else if (kind !== "checkpoint") Losslab.announce(`${event.kind}: ${event.message}`);
        refreshSoon();
      });
    }
    stream.addEventListener("open", () => Losslab.tellConnection(false));
    stream.addEventListener("end", hangUp);
    stream.addEventListener("error", () => {
      Losslab.tellConnection(true);
      if (stream?.readyState === EventSource.CLOSED) hangUp();
    });
  }

  function hangUp() {
    stream?.close();
    stream = null;
    refreshSoon();
  }

  if (isLive()) listen();
  setInterval(async () => {
    if (document.hidden && stream) return;
    const isAnswered = (isLive() || !stream) && (await Losslab.refresh());
    if (isAnswered && isLive()) listen();
  }, Losslab.RETRY_SECONDS * 1000);

  // The viewer: one picture an epoch, its grids cut out and compared cell by cell.
  const PICTURE = { perRow: 5, side: 160, pairGap: 8, columnGap: 24, caption: 40, title: 36 };
  const slider = byId("epoch-slider");
  const image = byId("picture");
  let pictures = readData("pictures");
  let shownUrl = null;

  function showPicture() {
    const picture = pictures[slider.valueAsNumber];
    byId("no-picture").hidden = Boolean(picture);
    document.querySelector(".slider").hidden = !picture;
    if (!picture) return;
    const isLatest = picture === pictures.at(-1);
    const what = [picture.is_best && "best", isLatest && "latest"].filter(Boolean).join(", ");
    const text = `epoch ${picture.epoch}${what ? ` (${what})` : ""}`;
    byId("epoch-shown").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    byId("show-best").disabled = picture.is_best || !pictures.some((p) => p.is_best);
    byId("show-latest").disabled = isLatest;
    if (shownUrl === picture.url) return;
    shownUrl = picture.url;
    image.hidden = false;
    image.src = picture.url;
    for (const near of [-1, 1]) {
      const neighbour = pictures[slider.valueAsNumber + near];
      if (neighbour) new Image().src = neighbour.url;
    }
  }

  function corner(index) {
    const { perRow, side, pairGap, columnGap, caption, title } = PICTURE;
    return [
      columnGap + (index % perRow) * (2 * side + pairGap + columnGap),
      title + caption + Math.floor(index / perRow) * (side + caption),
    ];
  }

  // The colours of a grid's cells; thin lines around the cells tell how many there are.
  function readCells(pixels, left, top) {
    const at = (x, y) => {
      const start = ((top + y) * pixels.width + left + x) * 4;
      return (pixels.data[start] << 16) | (pixels.data[start + 1] << 8) | pixels.data[start + 2];
    };
    const line = at(0, 1);
    let scale = 1;
    while (scale <= PICTURE.side && at(scale, 1) !== line) scale += 1;
    const size = Math.floor(PICTURE.side / scale);
    const middle = (i) => i * scale + Math.floor(scale / 2) + (scale < 4 ? 1 : 0);
    return Array.from({ length: size }, (_, y) =>
      Array.from({ length: size }, (_, x) => at(middle(x), middle(y))),
    );
  }

  const hex = (colour) => `#${colour.toString(16).padStart(6, "0")}`;

  function paintGrid(canvas, size, colourAt) {
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d");
    for (let y = 0; y < size; y += 1) {
      for (let x = 0; x < size; x += 1) {
        context.fillStyle = colourAt(x, y);
        context.fillRect(x, y, 1, 1);
      }
    }
  }

  function makeSample() {
    const item = document.createElement("li");
    for (const name of ["input", "reconstruction", "error"]) {
      const figure = item.appendChild(document.createElement("figure"));
      figure.appendChild(document.createElement("canvas")).setAttribute("role", "img");
      figure.appendChild(document.createElement("figcaption")).textContent = name;
    }
    item.appendChild(document.createElement("p"));
    return item;
  }

  function showSamples() {
    const picture = pictures.find(({ url }) => url === shownUrl);
    if (!picture) return;
    const scratch = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    const context = scratch.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, scratch.width, scratch.height);
    const list = byId("samples");
    while (list.children.length > picture.samples.length) list.lastChild.remove();
    while (list.children.length < picture.samples.length) list.append(makeSample());
    picture.samples.forEach((figures, index) => {
      const [left, top] = corner(index);
      const input = readCells(pixels, left, top);
      const output = readCells(pixels, left + PICTURE.side + PICTURE.pairGap, top);
      showSample(list.children[index], { input, output, figures, index });
    });
    byId("error-key").hidden = false;
    image.classList.add("unseen");
  }

  function showSample(item, { input, output, figures, index }) {
    const size = input.length;
    const style = getComputedStyle(document.documentElement);
    const wrong = { missed: 0, invented: 0, recoloured: 0 };
    const kind = (x, y) => {
      if (input[y][x] === output[y][x]) return null;
      if (!output[y][x]) return "missed";
      return input[y][x] ? "recoloured" : "invented";
    };
    const [first, second, third] = item.querySelectorAll("canvas");
    paintGrid(first, size, (x, y) => hex(input[y][x]));
    paintGrid(second, size, (x, y) => hex(output[y][x]));
    paintGrid(third, size, (x, y) => {
      const error = kind(x, y);
      if (error) wrong[error] += 1;
      return error ? style.getPropertyValue(`--${error}`) : input[y][x] ? "#55606e" : "#12161c";
    });
    first.setAttribute("aria-label", `grid ${index + 1}`);
    second.setAttribute("aria-label", `reconstruction of grid ${index + 1}`);
    const numWrong = wrong.missed + wrong.invented + wrong.recoloured;
    third.setAttribute("aria-label", `${numWrong} of ${size * size} cells are wrong`);
    item.dataset.numWrong = numWrong;
    item.dataset.numCells = size * size;
    const recall = figures.foreground_recall;
    const found = recall === null ? "no object" : `recall ${(100 * recall).toFixed(0)} %`;
    const named = Object.entries(wrong).filter(([, count]) => count);
    item.querySelector("p").textContent =
      `accuracy ${(100 * figures.pixel_accuracy).toFixed(1)} %, ${found}` +
      (named.length ? `; ${named.map(([name, count]) => `${count} ${name}`).join(", ")}` : "");
  }

  function moveTo(index) {
    slider.value = index;
    showPicture();
  }

  function takePictures() {
    const wasLatest = slider.valueAsNumber >= pictures.length - 1;
    pictures = readData("pictures");
    slider.max = Math.max(0, pictures.length - 1);
    moveTo(wasLatest ? pictures.length - 1 : slider.valueAsNumber);
  }

  image.addEventListener("load", showSamples);
  slider.addEventListener("input", showPicture);
  byId("show-best").addEventListener("click", () => moveTo(pictures.findIndex((p) => p.is_best)));
  byId("show-latest").addEventListener("click", () => moveTo(pictures.length - 1));
  document.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const isTyping = event.target.closest("input, select, textarea, .scroll, .log");
    if (!step || isTyping || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    moveTo(slider.valueAsNumber + step);
  });
  Losslab.listeners.push(takePictures);
  slider.max = Math.max(0, pictures.length - 1);
  moveTo(pictures.length - 1);
})();
