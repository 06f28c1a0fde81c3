// What the theme leaves out for screen readers and keyboards.
document.addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll("[role=heading]:not([aria-level])")) caption.ariaLevel = 2;
  for (const [part, name] of [[".sidebar-drawer", "Pages"], [".toc-drawer", "On this page"]])
    document.querySelector(part)?.setAttribute("aria-label", name);
  const reach = () => {  // what scrolls sideways can be scrolled by keyboard
    for (const wide of document.querySelectorAll("article pre, article .table-wrapper"))
      if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
      else wide.removeAttribute("tabindex");
  };
  reach();
  addEventListener("resize", reach);
});
