// Runs before the first paint, so that a chosen theme does not flash; a file of its own because inline scripts are forbidden.
try {
  const theme = JSON.parse(localStorage.getItem("receptance.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {}
