// The film: a slider moves all strips together, and shows that moment of each in large.
const SECONDS = 5; // for a whole film

function startFilm() {
  const slider = document.getElementById("moment");
  if (!slider) return;
  const films = [...document.querySelectorAll(".film")].map(readFilm);
  for (const choice of document.querySelectorAll("[name=view]")) {
    choice.addEventListener("change", () => {
      document.getElementById("evolution").classList.toggle("show-removed", choice.value === "removed");
    });
  }
  const show = () => films.forEach((film) => showMoment(film, Number(slider.value)));
  slider.addEventListener("input", show);
  show();

  const button = document.getElementById("play");
  const most = Math.max(2, ...films.map((film) => film.columns.length));
  button.disabled = films.every((film) => film.columns.length < 2);
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
    button.setAttribute("aria-pressed", "false");
  };
  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (Number(slider.value) >= 1) slider.value = 0;
    show();
    button.textContent = "Pause";
    button.setAttribute("aria-pressed", "true");
    timer = setInterval(() => {
      slider.value = Math.min(1, Number(slider.value) + 1 / (most - 1));
      show();
      if (Number(slider.value) >= 1) stop();
    }, (1000 * SECONDS) / most);
  });
}

function readFilm(film) {
  const heads = [...film.querySelectorAll(".strip thead th")].slice(1);
  const rows = [...film.querySelectorAll(".strip tbody tr")];
  const columns = heads.map((head, index) => ({
    head,
    tiles: rows.map((row) => row.cells[index + 1].firstElementChild),
  }));
  return { columns, stage: [...film.querySelectorAll(".stage .shown")], label: film.querySelector(".moment") };
}

function showMoment(film, share) {
  const now = Math.round(share * (film.columns.length - 1));
  film.columns.forEach(({ head, tiles }, index) => {
    for (const part of [head, ...tiles]) part.classList.toggle("now", index === now);
  });
  film.stage.forEach((tile, row) => {
    const from = film.columns[now].tiles[row].children;
    [...tile.children].forEach((image, index) => (image.src = from[index].src));
  });
  film.label.textContent = `step ${film.columns[now].head.textContent}`;
}
