// Line charts and a heat map, drawn by uPlot in the colours of the page.
"use strict";

const Charts = (() => {
  const HEIGHT = 220;
  const MARKER_SPACE = 12;
  const MAX_MARKED_CURVES = 12;
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];
  const charts = [];

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function format(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.001 || size >= 100000)) return value.toExponential(1);
    return String(Number(value.toPrecision(4)));
  }

  // The legend's value of a curve: at the pointer, or else the last one.
  function legendValue(chart, value, index, position) {
    const isOutside = position === null || position === undefined;
    return format(isOutside ? chart.data[index].findLast((v) => v !== null && v !== undefined) : value);
  }

  function axis(options = {}) {
    return {
      stroke: colour("--muted"),
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { stroke: colour("--line"), width: 1, size: 4 },
      font: "12px system-ui, sans-serif",
      size: 56,
      gap: 4,
      ...options,
    };
  }

  const epochAxis = (chart) => [
    axis({ size: 28, space: 48, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500] }),
    ...chart,
  ];

  // The target band, drawn behind the curves, and over them the lines that they are compared with: a
  // value each, or a value with the colour of its curve.
  function marks(panel, { band, lines }) {
    const at = (chart, value) => chart.valToPos(value, "y", true);
    const inside = (chart, y) =>
      Math.min(Math.max(y, chart.bbox.top), chart.bbox.top + chart.bbox.height);
    return {
      hooks: {
        drawClear: (chart) => {
          if (!band) return;
          const [bottom, top] = band().map((value) => inside(chart, at(chart, value)));
          panel.dataset.band = band().join(" ");
          chart.ctx.fillStyle = colour("--band");
          chart.ctx.fillRect(chart.bbox.left, top, chart.bbox.width, bottom - top);
        },
        draw: (chart) => {
          const { ctx, bbox } = chart;
          ctx.save();
          ctx.lineWidth = devicePixelRatio;
          ctx.setLineDash([6 * devicePixelRatio, 4 * devicePixelRatio]);
          const drawn = (lines ? lines() : [])
            .map((line) => (typeof line === "number" ? [line, "--text"] : line))
            .filter(([value]) => {
              const y = at(chart, value);
              return y >= bbox.top && y <= bbox.top + bbox.height;
            });
          panel.dataset.lines = drawn.map(([value]) => value).join(" ");
          for (const [value, name] of drawn) {
            ctx.strokeStyle = colour(name);
            const y = Math.round(at(chart, value)) + (ctx.lineWidth % 2) / 2; // on whole pixels
            ctx.beginPath();
            ctx.moveTo(bbox.left, y);
            ctx.lineTo(bbox.left + bbox.width, y);
            ctx.stroke();
          }
          ctx.restore();
        },
      },
    };
  }

  // Two standard errors to each side of the first curve's values: epochs and errors.
  function whiskers(errors) {
    const draw = (chart) => {
      const { ctx, bbox } = chart;
      const known = new Map(errors()[0].map((epoch, index) => [epoch, errors()[1][index]]));
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      ctx.strokeStyle = chart.series[1].stroke(chart, 1);
      ctx.lineWidth = devicePixelRatio;
      ctx.beginPath();
      chart.data[0].forEach((epoch, index) => {
        const [value, error] = [chart.data[1][index], known.get(epoch)];
        if (typeof value !== "number" || typeof error !== "number") return;
        const x = chart.valToPos(epoch, "x", true);
        ctx.moveTo(x, chart.valToPos(value - 2 * error, "y", true));
        ctx.lineTo(x, chart.valToPos(value + 2 * error, "y", true));
      });
      ctx.stroke();
      ctx.restore();
    };
    return { hooks: { draw } };
  }

  // One chart that follows the width of its panel and the colours of the page.
  class Chart {
    constructor(panel, makeOptions, data) {
      this.box = panel.querySelector(".plot");
      this.panel = panel;
      this.makeOptions = makeOptions;
      this.data = data;
      this.box.setAttribute("role", "img");
      this.draw();
      charts.push(this);
    }

    draw() {
      this.plot?.destroy();
      const width = this.box.clientWidth;
      this.plot = new uPlot({ width, height: HEIGHT, ...this.makeOptions() }, this.data, this.box);
      this.describe();
    }

    describe() {
      const [epochs, ...curves] = this.data;
      this.box.dataset.numEpochs = epochs.length;
      const title = this.panel.querySelector("figcaption").firstChild.textContent.trim();
      const last = curves.slice(0, 8).map((values, index) => {
        const name = this.plot.series[index + 1].label;
        return `${name} ${format(values.findLast((v) => v !== null && v !== undefined))}`;
      });
      const range = epochs.length ? `epoch ${epochs[0]} to ${epochs.at(-1)}; last: ` : "no epoch yet";
      this.box.setAttribute("aria-label", `${title}, ${range}${epochs.length ? last.join(", ") : ""}`);
    }

    setData(data) {
      this.data = data;
      this.plot.setData(data);
      this.describe();
    }

    // Draw again with new marks but the same curves.
    redraw() {
      this.plot.redraw(false);
    }

    // Highlight one curve, or none.
    highlight(index) {
      this.plot.setSeries(index === null ? null : index + 1, { focus: index !== null });
    }
  }

  function lines(panel, { curves, band, marked, errors, range, rightRange, legend = true }, data) {
    // A single epoch makes no line and needs a marker; more epochs get markers while they do not
    // overlap.
    const hasMarkers = (chart) => {
      if (chart.data[0].length < 2) return true;
      const [first, last] = chart.series[0].idxs;
      const space = MARKER_SPACE * devicePixelRatio * (last - first);
      return curves.length <= MAX_MARKED_CURVES && space <= chart.bbox.width;
    };
    const makeOptions = () => ({
      scales: {
        x: { time: false, range: (_, low, high) => [low ?? 1, Math.max(high ?? 2, (low ?? 1) + 1)] },
        y: range ? { range } : {},
        ...(rightRange ? { right: { range: rightRange } } : {}),
      },
      axes: epochAxis([
        axis({ values: (_, ticks) => ticks.map(format) }),
        ...(rightRange
          ? [axis({ side: 1, scale: "right", grid: { show: false }, values: (_, t) => t.map(format), size: 60 })]
          : []),
      ]),
      series: [
        { label: "epoch", value: legendValue },
        ...curves.map((curve, index) => ({
          label: curve.label,
          scale: curve.scale || "y",
          stroke: colour(`--curve-${(curve.colour ?? index) % 7}`),
          dash: DASHES[(curve.dash ?? 0) % DASHES.length],
          width: curves.length > 12 ? 1 : 2,
          spanGaps: true,
          points: { show: hasMarkers, size: 6 },
          value: legendValue,
        })),
      ],
      legend: {
        show: legend,
        live: legend,
        markers: { dash: (chart, index) => (chart.series[index].dash?.length ? "dashed" : "solid") },
      },
      focus: { alpha: 0.15 },
      cursor: { focus: { prox: curves.length > 1 ? 16 : -1 }, drag: { x: true, y: false } },
      plugins: [marks(panel, { band, lines: marked }), ...(errors ? [whiskers(errors)] : [])],
    });
    return new Chart(panel, makeOptions, data);
  }

  // One row per dimension, one column per epoch; collapsed dimensions have their own colour.
  function heat(panel, { limit }, data) {
    const shade = (value) => {
      if (value === null || value === undefined) return colour("--line");
      if (value <= limit) return colour("--heat-dead");
      const share = Math.min(1, Math.log(value / limit) / Math.log(4 / limit));
      return colour(`--heat-${Math.min(6, Math.floor(share * 7))}`);
    };
    const paint = (chart) => {
      const { ctx } = chart;
      const [epochs, ...dimensions] = chart.data;
      const shades = new Map();
      panel.dataset.numCollapsed = dimensions.flat().filter((v) => v !== null && v <= limit).length;
      const half = epochs.length > 1 ? (epochs.at(-1) - epochs[0]) / (epochs.length - 1) / 2 : 0.5;
      dimensions.forEach((values, dimension) => {
        const top = chart.valToPos(dimension + 0.5, "y", true);
        const bottom = chart.valToPos(dimension - 0.5, "y", true);
        values.forEach((value, index) => {
          const key = value === null ? null : Math.round(value * 100);
          if (!shades.has(key) || value <= limit * 1.2) shades.set(key, shade(value));
          const left = Math.max(chart.bbox.left, chart.valToPos(epochs[index] - half, "x", true));
          const right = chart.valToPos(epochs[index] + half, "x", true);
          const end = Math.min(right, chart.bbox.left + chart.bbox.width);
          ctx.fillStyle = shades.get(key);
          ctx.fillRect(Math.floor(left), top, Math.ceil(end - Math.floor(left)), Math.ceil(bottom - top));
        });
      });
    };
    const makeOptions = () => ({
      scales: {
        x: { time: false, range: (_, low, high) => [(low ?? 1) - 0.5, (high ?? 2) + 0.5] },
        y: { range: (chart) => [-0.5, Math.max(1, chart.data.length - 1) - 0.5] },
      },
      axes: epochAxis([
        axis({ grid: { show: false }, incrs: [1, 2, 5, 10, 20, 50, 100], values: (_, t) => t.map(String) }),
      ]),
      series: [
        { label: "epoch", value: legendValue },
        ...data.slice(1).map((_, index) => ({
          label: `d${index}`,
          paths: () => null,
          points: { show: false },
          value: legendValue,
        })),
      ],
      legend: { show: data.length <= 17, live: true },
      cursor: { drag: { x: true, y: false } },
      hooks: { draw: [paint] },
    });
    return new Chart(panel, makeOptions, data);
  }

  // Put several curves, each [epochs, values], on one common list of epochs.
  function join(curves) {
    const epochs = [...new Set(curves.flatMap(([x]) => x))].sort((a, b) => a - b);
    const place = new Map(epochs.map((epoch, index) => [epoch, index]));
    return [
      epochs,
      ...curves.map(([x, values]) => {
        const column = new Array(epochs.length).fill(undefined);
        x.forEach((epoch, index) => (column[place.get(epoch)] = values[index]));
        return column;
      }),
    ];
  }

  // For shares that are mostly far below 1.
  const fromZero = (_, low, high) => [0, Math.min(1, Math.max(high, 0.2) * 1.1)];

  const redraw = () => charts.forEach((chart) => chart.draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new ResizeObserver(() => {
    for (const { plot, box } of charts) {
      if (plot.width !== box.clientWidth) plot.setSize({ width: box.clientWidth, height: HEIGHT });
    }
  }).observe(document.documentElement);

  return { fromZero, heat, join, lines };
})();
