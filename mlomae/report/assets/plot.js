// One small plot: axes, lines of all runs, and a mark at the step that the reader points at.
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 172;
const MARGIN = { left: 58, right: 10, top: 8, bottom: 22 };

class Plot {
  /**
   * @param figure the panel's element.
   * @param data {title, kind, log, lines: [{run, style, x, y}], levels: [{y, label}]}.
   * @param runs [{name, end}], where end is the last step.
   * @param view {hidden: Set of runs, smoothing}, shared by all plots.
   * @param onPoint called with the step that the reader points at, or null.
   */
  constructor(figure, data, runs, view, onPoint) {
    Object.assign(this, { data, runs, view, onPoint, log: data.log, step: null });
    this.host = figure.querySelector(".plot");
    this.readout = figure.querySelector(".readout");
    this.steps = [...new Set(data.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    this.listen(figure.querySelector(".log"));
    new ResizeObserver(() => this.draw()).observe(this.host);
  }

  listen(button) {
    const positive = this.data.lines.some((line) => line.y.some((y) => y > 0));
    button.disabled = !positive;
    button.setAttribute("aria-pressed", this.log);
    button.addEventListener("click", () => {
      this.log = !this.log;
      button.setAttribute("aria-pressed", this.log);
      this.draw();
    });
    const host = this.host;
    Object.assign(host, { tabIndex: 0, role: "slider" });
    host.setAttribute("aria-label", host.dataset.summary);
    host.setAttribute("aria-valuemin", this.steps[0]);
    host.setAttribute("aria-valuemax", this.steps.at(-1));
    for (const kind of ["pointermove", "pointerdown"]) {
      host.addEventListener(kind, (event) => {
        const left = host.getBoundingClientRect().left;
        this.onPoint(this.stepAt(event.clientX - left));
      });
    }
    // A finger leaves whenever it is lifted: its step stays until another place is touched.
    host.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && this.onPoint(null));
    host.addEventListener("blur", () => this.onPoint(null));
    host.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    const last = this.steps.length - 1;
    const at = this.step === null ? last : this.steps.indexOf(nearest(this.steps, this.step));
    const stride = event.shiftKey ? 10 : 1;
    const moves = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: last };
    if (event.key === "Escape") this.onPoint(null);
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.onPoint(this.steps[Math.min(last, Math.max(0, moves[event.key]))]);
  }

  stepAt(x) {
    const { low, high } = this.xs;
    const share = (x - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right);
    return Math.min(high, Math.max(low, low + share * (high - low)));
  }

  draw() {
    this.width = this.host.clientWidth;
    if (!this.width) return;
    const root = shape("svg", { width: this.width, height: HEIGHT, "aria-hidden": true });
    this.lines = this.data.lines
      .filter((line) => !this.view.hidden.has(line.run))
      .map((line) => ({ ...line, shown: smoothed(line.y, this.view.smoothing) }));
    this.scale();
    this.drawAxes(root);
    this.drawLevels(root);
    for (const line of this.lines) {
      if (this.view.smoothing) root.append(this.drawLine(line, line.y, "line raw"));
      root.append(this.drawLine(line, line.shown, `line ${line.style}`));
    }
    this.cursor = shape("g", { class: "cursor" });
    root.append(this.cursor);
    this.host.replaceChildren(root);
    this.point(this.step);
  }

  usable(y) {
    return y !== null && (!this.log || y > 0);
  }

  scale() {
    // The same in all plots, so that a step is at the same place in each.
    this.xs = { low: 0, high: Math.max(1, ...this.runs.map((run) => run.end)) };
    const values = [...this.lines.flatMap((line) => line.y), ...this.data.levels.map((level) => level.y)];
    const put = (y) => (this.log ? Math.log10(y) : y);
    let [bottom, top] = [Infinity, -Infinity];
    for (const y of values) {
      if (!this.usable(y)) continue;
      bottom = Math.min(bottom, put(y));
      top = Math.max(top, put(y));
    }
    if (bottom > top) [bottom, top] = [0, 1];
    if (bottom === top) {
      const half = this.log ? 0.5 : Math.abs(top) * 0.1 || 1;
      [bottom, top] = [bottom - (bottom === 0 ? 0 : half), top + half];
    }
    const pad = 0.06 * (top - bottom);
    const floor = !this.log && bottom >= 0 && bottom < 0.3 * top;
    // The name of a level stands below it.
    const room = this.data.levels.length ? 3 * pad : pad;
    this.ys = { low: floor ? 0 : bottom - room, high: top + pad };
    const inner = { x: this.width - MARGIN.left - MARGIN.right, y: HEIGHT - MARGIN.top - MARGIN.bottom };
    this.x = (step) => MARGIN.left + (inner.x * (step - this.xs.low)) / (this.xs.high - this.xs.low);
    this.y = (y) => MARGIN.top + inner.y * (1 - (put(y) - this.ys.low) / (this.ys.high - this.ys.low));
  }

  drawAxes(root) {
    const { left, right } = MARGIN, bottom = HEIGHT - MARGIN.bottom;
    for (const { value, label } of this.yTicks()) {
      const y = this.y(value);
      root.append(shape("line", { class: "grid", x1: left, x2: this.width - right, y1: y, y2: y }));
      root.append(shape("text", { x: left - 6, y: y + 3.5, "text-anchor": "end" }, label));
    }
    const wide = (step) => 6.8 * format(step, "count").length;
    // linearTicks may return half as many again.
    const count = (this.width - left - right) / (wide(this.xs.high) + 14) / 1.5;
    for (const step of linearTicks(this.xs.low, this.xs.high, count).filter(Number.isInteger)) {
      const x = Math.min(this.x(step), this.width - wide(step) / 2);
      root.append(shape("text", { x, y: bottom + 15, "text-anchor": "middle" }, format(step, "count")));
    }
    root.append(shape("line", { class: "axis", x1: left, x2: this.width - right, y1: bottom, y2: bottom }));
  }

  yTicks() {
    const { low, high } = this.ys;
    if (this.log && high - low > 1) {
      const stride = Math.ceil((high - low) / 5);
      const first = Math.ceil(low / stride) * stride;
      const powers = range(first, high, stride).map((power) => 10 ** power);
      if (powers.length > 1) return powers.map((value) => ({ value, label: formatPower(value, this.data.kind) }));
    }
    const [bottom, top] = this.log ? [10 ** low, 10 ** high] : [low, high];
    const unit = this.data.kind === "bytes" ? 1024 ** bytesPower(top) : 1;
    const values = linearTicks(bottom / unit, top / unit, 4).map((value) => value * unit);
    const step = values.length > 1 ? values[1] - values[0] : Math.abs(values[0] || 1);
    return values.map((value) => ({ value, label: formatTick(value, step, this.data.kind, top) }));
  }

  drawLevels(root) {
    for (const { y, label } of this.data.levels) {
      if (!this.usable(y)) continue;
      const [at, end] = [this.y(y), this.width - MARGIN.right];
      root.append(shape("line", { class: "level", x1: MARGIN.left, x2: end, y1: at, y2: at }));
      root.append(shape("text", { class: "level", x: end, y: at + 13, "text-anchor": "end" }, label));
    }
  }

  drawLine(line, values, kind) {
    const group = shape("g", { class: kind, style: `--c: var(--run-${line.run % COLORS})`, "data-run": line.run });
    if (line.run >= COLORS) group.classList.add("late");
    let path = "", pen = false;
    values.forEach((y, index) => {
      const drawn = this.usable(y);
      if (drawn) {
        const alone = !pen && !this.usable(values[index + 1] ?? null);
        const at = `${this.x(line.x[index]).toFixed(1)} ${this.y(y).toFixed(1)}`;
        // A point between gaps has no length: a short stroke with round ends is a dot.
        path += alone ? `M${at}h0.01` : `${pen ? "L" : "M"}${at}`;
      }
      pen = drawn;
    });
    group.append(shape("path", { d: path }));
    return group;
  }

  /** Marks a step in the plot and reads the lines there; null: no step, the last values. */
  point(step) {
    this.step = step;
    if (!this.cursor) return;
    const found = this.lines.map((line) => ({ line, at: this.read(line, step) }));
    const marks = [];
    if (step !== null) {
      const x = this.x(step);
      marks.push(shape("line", { x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
      for (const { line, at } of found) {
        if (at === null || !this.usable(line.shown[at])) continue;
        const place = { cx: this.x(line.x[at]), cy: this.y(line.shown[at]), r: 3.2 };
        marks.push(shape("circle", { ...place, style: `--c: var(--run-${line.run % COLORS})` }));
      }
    }
    this.cursor.replaceChildren(...marks);
    this.tell(step, found);
  }

  tell(step, found) {
    const moment = step === null ? "last" : `step ${format(Math.round(step), "count")}`;
    const entries = found.map(({ line, at }) => {
      const value = format(at === null ? null : line.shown[at], this.data.kind);
      const entry = element("span", `value ${line.style}`, value);
      entry.style.setProperty("--c", `var(--run-${line.run % COLORS})`);
      entry.title = this.runs[line.run].name;
      return { entry, words: `${this.runs[line.run].name}${line.style ? ` (${line.style})` : ""} ${value}` };
    });
    this.readout.replaceChildren(element("span", "step", moment), ...entries.map(({ entry }) => entry));
    this.host.setAttribute("aria-valuenow", Math.round(step ?? this.steps.at(-1)));
    this.host.setAttribute("aria-valuetext", `${moment}: ${entries.map(({ words }) => words).join(", ")}`);
  }

  /** The place of the value nearest to a step in a line; null where its run has ended. */
  read(line, step) {
    if (step === null) {
      const last = line.shown.findLastIndex((y) => y !== null);
      return last < 0 ? null : last;
    }
    if (step > this.runs[line.run].end) return null;
    return line.x.indexOf(nearest(line.x, step));
  }
}

/** Exponential moving average without the pull of its start; gaps stay gaps. */
function smoothed(values, weight) {
  if (!weight) return values;
  let [sum, total] = [0, 0];
  return values.map((y) => {
    if (y === null) return null;
    sum = weight * sum + (1 - weight) * y;
    total = weight * total + 1 - weight;
    return sum / total;
  });
}

/** The element of a sorted list that is nearest to a number. */
function nearest(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle;
    else high = middle;
  }
  return value - sorted[low] < sorted[high] - value ? sorted[low] : sorted[high];
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  const base = 10 ** Math.floor(Math.log10(rough));
  // Of 1, 2, 5 and 10 the one that is nearest by ratio.
  const bounds = [[Math.SQRT2, 1], [Math.sqrt(10), 2], [Math.sqrt(50), 5], [Infinity, 10]];
  const step = base * bounds.find(([bound]) => rough < base * bound)[1];
  return range(Math.ceil(low / step - 1e-9), high / step + 1e-9, 1).map((index) => index * step + 0);
}

function range(first, last, step) {
  const values = [];
  for (let value = first; value <= last; value += step) values.push(value);
  return values;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function element(name, kind, text) {
  const made = document.createElement(name);
  made.className = kind;
  made.textContent = text;
  return made;
}
