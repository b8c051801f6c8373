// Numbers for people, as mlomae/report/figures.py writes them.
const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

function format(value, kind) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (kind === "share") return percentage(100 * value);
  if (kind === "count") return grouped(value, 0);
  if (kind === "bytes") {
    const power = bytesPower(value);
    return `${Number((value / 1024 ** power).toPrecision(3))} ${UNITS[power]}`;
  }
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e-3 && size < 1e5) return grouped(value, Math.max(0, 3 - Math.floor(Math.log10(size))));
  const [mantissa, exponent] = value.toExponential(2).split("e");
  return `${minus(mantissa)} × 10${superscript(Number(exponent))}`;
}

// Ticks need as many digits as tell them apart, and no more; those of one axis have the unit of the highest.
function formatTick(value, step, kind, highest = value) {
  if (kind === "share") return `${minus((100 * value).toFixed(decimals(100 * step)))} %`;
  if (kind === "bytes") {
    const power = bytesPower(highest);
    return value === 0 ? "0" : `${Number((value / 1024 ** power).toPrecision(3))} ${UNITS[power]}`;
  }
  if (value === 0) return "0";
  if (Math.abs(value) >= 1e5 || step < 1e-4) {
    const exponent = Math.floor(Math.log10(Math.abs(value)) + 1e-9);
    const mantissa = Number((value / 10 ** exponent).toFixed(2));
    return mantissa === 1 ? `10${superscript(exponent)}` : `${minus(String(mantissa))}·10${superscript(exponent)}`;
  }
  return grouped(value, decimals(step));
}

// Of a logarithmic axis: 10 to a whole power.
function formatPower(value, kind) {
  const plain = kind !== "number" || (value >= 0.01 && value < 1e5);
  return plain ? formatTick(value, value, kind) : `10${superscript(Math.round(Math.log10(value)))}`;
}

function percentage(value) {
  const size = Math.abs(value);
  // Two digits of what is small, or it would read 0.0 %.
  const decimals = size > 0 && size < 1 ? Math.min(9, 1 - Math.floor(Math.log10(size))) : 1;
  return `${minus(value.toFixed(decimals))} %`;
}

function decimals(step) {
  return Math.max(0, Math.min(4, -Math.floor(Math.log10(step) + 1e-9)));
}

function bytesPower(value) {
  const size = Math.abs(value);
  return size < 1 ? 0 : Math.min(Math.floor(Math.log2(size) / 10), UNITS.length - 1);
}

function grouped(value, digits) {
  const text = value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return minus(text);
}

function minus(text) {
  return text.replace("-", "−");
}

function superscript(number) {
  const digits = [...String(Math.abs(number))].map((digit) => SUPERSCRIPTS[digit]).join("");
  return (number < 0 ? "⁻" : "") + digits;
}
