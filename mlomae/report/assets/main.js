// What is left: tables, theme, printing; then everything starts.
function startTables() {
  for (const button of document.querySelectorAll("table.sortable th button")) {
    button.addEventListener("click", () => sortBy(button.closest("th")));
  }
}

function sortBy(head) {
  const table = head.closest("table"), body = table.tBodies[0];
  const column = head.cellIndex;
  const keyed = [...body.rows].map((row) => ({ row, key: row.cells[column].dataset.key }));
  const known = keyed.filter(({ key }) => key !== undefined);
  const numeric = known.every(({ key }) => Number.isFinite(Number(key)));
  // Numbers start with the largest, words with the first.
  const before = head.getAttribute("aria-sort") ?? (numeric ? "ascending" : "descending");
  const order = before === "ascending" ? "descending" : "ascending";
  const sign = order === "ascending" ? 1 : -1;
  known.sort((a, b) => sign * (numeric ? a.key - b.key : a.key.localeCompare(b.key)));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  // Rows without a value stay last, whichever the order.
  body.append(...known.map(({ row }) => row), ...keyed.filter(({ key }) => key === undefined).map(({ row }) => row));
}

function startTheme() {
  const button = document.getElementById("theme"), root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => (button.textContent = isDark() ? "Light theme" : "Dark theme");
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("mlomae-theme", root.dataset.theme);
    } catch { /* then only until the page is closed */ }
    show();
  });
  system.addEventListener("change", show);
  show();
}

// Paper shows what is folded away on the screen.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not(.hint)")) details.open = true;
});

startTheme();
startTables();
startFilm();
startCurves(JSON.parse(document.getElementById("data").textContent));
