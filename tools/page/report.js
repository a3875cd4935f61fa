// Show the cards of one type and one result; a heading without cards is hidden. Without JavaScript all are shown.
const [type, result] = document.querySelectorAll("nav select"), count = document.querySelector("nav small");
function show() {
  let n = 0;
  for (const part of document.querySelectorAll("section")) {
    let some = false;
    for (const card of part.querySelectorAll(".card")) {
      const fits = (!type.value || part.dataset.type === type.value)
        && (!result.value || card.dataset.result.split(" ").includes(result.value));
      card.hidden = !fits;
      some ||= fits;
      n += fits;
    }
    part.hidden = !some;
  }
  count.textContent = `${n} on this page`;
}
for (const choice of [type, result]) choice.addEventListener("change", show);
show();
