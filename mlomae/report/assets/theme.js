// Before the page is drawn, so that it never flashes in the other theme.
try {
  const theme = localStorage.getItem("mlomae-theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch { /* storage may be forbidden: the system's theme then */ }
