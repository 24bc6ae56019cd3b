// The viewer of a job's pictures: cuts the grids out of a picture and compares them cell by cell.
"use strict";

(() => {
  const { byId, readData } = Losslab;

  // The layout of the worker's pictures, in pixels.
  const PICTURE = { side: 160, gridGap: 8, columnGap: 24, caption: 40, title: 36 };
  const SAMPLES_PER_ROW = { 2: 5, 3: 3 }; // by the grids of each
  const slider = byId("epoch-slider");
  const image = byId("picture");
  let pictures = readData("pictures");
  let wantedUrl = null; // of the picture that is shown or loading
  const samples = byId("samples");
  const note = byId("picture-note");

  function showPicture() {
    const picture = pictures[slider.valueAsNumber];
    if (!picture) return;
    slider.disabled = false;
    const isLatest = picture === pictures.at(-1);
    const what = [picture.is_best && "best", isLatest && "latest"].filter(Boolean).join(", ");
    const text = `epoch ${picture.epoch}${what ? ` (${what})` : ""}`;
    byId("epoch-shown").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    byId("show-best").disabled = picture.is_best || !pictures.some((p) => p.is_best);
    byId("show-latest").disabled = isLatest;
    if (wantedUrl === picture.url) return;
    wantedUrl = picture.url;
    samples.classList.add("outdated");
    image.hidden = false;
    image.src = picture.url;
    for (const near of [-1, 1]) {
      const neighbour = pictures[slider.valueAsNumber + near];
      if (neighbour) new Image().src = neighbour.url;
    }
  }

  // The corners of a sample's grids. Older pictures have none at the true share.
  function corners(index, numGrids) {
    const { side, gridGap, columnGap, caption, title } = PICTURE;
    const perRow = SAMPLES_PER_ROW[numGrids];
    const left = columnGap + (index % perRow) * (numGrids * (side + gridGap) - gridGap + columnGap);
    const top = title + caption + Math.floor(index / perRow) * (side + caption);
    return Array.from({ length: numGrids }, (_, number) => [left + number * (side + gridGap), top]);
  }

  // The colours of a grid's cells. The thin lines between the cells show how many there are.
  function readCells(pixels, left, top) {
    const at = (x, y) => {
      const start = ((top + y) * pixels.width + left + x) * 4;
      return (pixels.data[start] << 16) | (pixels.data[start + 1] << 8) | pixels.data[start + 2];
    };
    const line = at(0, 1);
    let scale = 1;
    while (scale <= PICTURE.side && at(scale, 1) !== line) scale += 1;
    let size = 1;
    while (at(size * scale, 1) === line) size += 1;
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

  function showSamples() {
    const picture = pictures.find(({ url }) => url === wantedUrl);
    // This may be the load event of the previous picture, while the wanted one is still loading.
    if (!picture || !image.complete || !image.naturalWidth) return;
    const scratch = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    const context = scratch.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, scratch.width, scratch.height);
    while (samples.children.length > picture.samples.length) samples.lastElementChild.remove();
    while (samples.children.length < picture.samples.length) {
      samples.append(samples.firstElementChild.cloneNode(true));
    }
    picture.samples.forEach((values, index) => {
      const places = corners(index, values.matched_accuracy == null ? 2 : 3);
      const [input, output, matched] = places.map(([left, top]) => readCells(pixels, left, top));
      showSample(samples.children[index], { input, output, matched, values, index });
    });
    samples.classList.remove("outdated");
    samples.removeAttribute("aria-hidden");
    note.textContent = "";
  }

  // After a failed load: the grids of the previous epoch must not stay under the new epoch's name.
  function clearSamples() {
    const epoch = pictures.find(({ url }) => url === wantedUrl)?.epoch;
    wantedUrl = null;
    samples.setAttribute("aria-hidden", "true");
    for (const canvas of samples.querySelectorAll("canvas")) canvas.width = canvas.height = 1;
    for (const text of samples.querySelectorAll("p")) text.textContent = "";
    note.textContent = `The picture of epoch ${epoch} could not be loaded. This page tries again automatically.`;
  }

  function showSample(item, { input, output, matched, values, index }) {
    const size = input.length;
    const style = getComputedStyle(document.documentElement);
    const wrong = { missed: 0, invented: 0, recoloured: 0 };
    const kind = (x, y) => {
      if (input[y][x] === output[y][x]) return null;
      if (!output[y][x]) return "missed";
      return input[y][x] ? "recoloured" : "invented";
    };
    const [first, second, atTrueShare, third] = item.querySelectorAll("canvas");
    paintGrid(first, size, (x, y) => hex(input[y][x]));
    paintGrid(second, size, (x, y) => hex(output[y][x]));
    atTrueShare.parentElement.hidden = !matched;
    if (matched) paintGrid(atTrueShare, size, (x, y) => hex(matched[y][x]));
    paintGrid(third, size, (x, y) => {
      const error = kind(x, y);
      if (error) wrong[error] += 1;
      return error ? style.getPropertyValue(`--${error}`) : input[y][x] ? "#55606e" : "#12161c";
    });
    first.setAttribute("aria-label", `grid ${index + 1}`);
    second.setAttribute("aria-label", `reconstruction of grid ${index + 1}`);
    atTrueShare.setAttribute("aria-label", `grid ${index + 1} at the true share of foreground`);
    const numWrong = wrong.missed + wrong.invented + wrong.recoloured;
    third.setAttribute("aria-label", `${numWrong} of ${size * size} cells are wrong`);
    item.dataset.numWrong = numWrong;
    item.dataset.numCells = size * size;
    const recall = values.foreground_recall;
    const found = recall === null ? "no object" : `recall ${(100 * recall).toFixed(0)} %`;
    const named = Object.entries(wrong).filter(([, count]) => count);
    item.querySelector("p").textContent =
      `accuracy ${(100 * values.pixel_accuracy).toFixed(1)} %, ${found}` +
      (named.length ? `; ${named.map(([name, count]) => `${count} ${name}`).join(", ")}` : "") +
      (matched ? `; at the true share ${(100 * values.matched_accuracy).toFixed(1)} %` : "");
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
  image.addEventListener("error", clearSamples);
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
