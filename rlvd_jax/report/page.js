// Marks in the table of contents the part of the page that is being read.
const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
const parts = [...links.keys()].map((id) => document.getElementById(id));
let waiting = false;
function mark() {
  waiting = false;
  const read = parts.filter((part) => part.getBoundingClientRect().top < innerHeight / 3).pop() || parts[0];
  for (const [id, a] of links) a.classList.toggle("here", id === read.id);
}
addEventListener("scroll", () => { if (!waiting) { waiting = true; requestAnimationFrame(mark); } }, { passive: true });
mark();
