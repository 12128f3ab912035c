// A row of tokens that can be clicked or walked with the arrow keys; reports the index of the chosen one.
// Text goes in as textContent only. `data`: tokens, tips, styles (made by app/markup.py), chosen.
export default function (component) {
  const { data, parentElement, setStateValue } = component
  const strip = parentElement.querySelector("#strip")
  // The row is made anew at each run of the page; the place of the keyboard is kept.
  const focused = [...strip.children].indexOf(strip.getRootNode().activeElement)
  strip.replaceChildren()
  const buttons = data.tokens.map((text, i) => {
    const b = document.createElement("button")
    b.type = "button"
    b.textContent = text
    b.title = data.tips[i]
    b.setAttribute("aria-label", data.tips[i])
    b.setAttribute("aria-pressed", String(i === data.chosen))
    b.tabIndex = i === Math.max(data.chosen, 0) ? 0 : -1
    b.style.cssText = data.styles[i]
    b.onclick = () => setStateValue("chosen", i)
    strip.appendChild(b)
    return b
  })
  if (focused >= 0 && focused < buttons.length) buttons[focused].focus()
  strip.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key]
    if (!step) return
    const now = buttons.indexOf(event.target)
    const next = buttons[Math.min(Math.max(now + step, 0), buttons.length - 1)]
    buttons.forEach((b) => (b.tabIndex = -1))
    next.tabIndex = 0
    next.focus()
    event.preventDefault()
  }
}
