// All plots of the page: one step, one smoothing and one choice of runs for all of them.
const COLORS = 8;

function startCurves(data) {
  const view = { hidden: new Set(), smoothing: 0 };
  let [wanted, waiting] = [null, false];
  const pointAll = (step) => {
    wanted = step;
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      for (const plot of plots) plot.point(wanted);
    });
  };
  const plots = [...document.querySelectorAll("[data-panel]")].map(
    (figure) => new Plot(figure, data.panels[figure.dataset.panel], data.runs, view, pointAll),
  );
  const drawAll = () => plots.forEach((plot) => plot.draw());

  for (const button of document.querySelectorAll(".legend [data-run]")) {
    const run = Number(button.dataset.run);
    button.addEventListener("click", () => {
      if (!view.hidden.delete(run)) view.hidden.add(run);
      button.setAttribute("aria-pressed", !view.hidden.has(run));
      drawAll();
    });
    const stress = (on) => {
      for (const line of document.querySelectorAll(".plot .line")) {
        line.classList.toggle("faded", on && Number(line.dataset.run) !== run);
      }
    };
    for (const [kind, on] of [["pointerenter", true], ["pointerleave", false], ["focus", true], ["blur", false]]) {
      button.addEventListener(kind, () => stress(on));
    }
  }
  const smoothing = document.getElementById("smoothing");
  smoothing?.addEventListener("input", () => {
    view.smoothing = Number(smoothing.value);
    smoothing.nextElementSibling.value = smoothing.value;
    drawAll();
  });
}
