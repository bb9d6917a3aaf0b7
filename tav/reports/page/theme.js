// Runs before the page is drawn: marks that scripts work, and applies the theme that was chosen last.
document.documentElement.classList.add("js");
try {
  const chosen = localStorage.getItem("tav-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* A page opened from a file may have no storage. */ }
