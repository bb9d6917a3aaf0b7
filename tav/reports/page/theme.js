// Before the page is drawn: scripts run here, and the theme that was chosen last time.
document.documentElement.classList.add("js");
try {
  const chosen = localStorage.getItem("tav-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* A page of a file may have no storage. */ }
