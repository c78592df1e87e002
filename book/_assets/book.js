// What the theme leaves out for a keyboard and for a screen reader (`.ci/look.py --axe` finds such things).
document.addEventListener('DOMContentLoaded', () => {
  // The label says less than the text that it hides.
  for (const summary of document.querySelectorAll('summary[aria-label]')) summary.removeAttribute('aria-label');
  for (const entry of document.querySelectorAll('[role="doc-biblioentry"]')) entry.setAttribute('role', 'listitem');
  const reach = () => {
    for (const wide of document.querySelectorAll('article table, article pre'))
      if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
  };
  reach();
  addEventListener('resize', reach);
});
