import { render } from "preact";
import { App } from "./App";
import * as store from "./store";
import "./style.css";

render(<App />, document.getElementById("app")!);
void store.start();
addEventListener("popstate", () => void store.follow());
addEventListener("hashchange", () => void store.follow());
addEventListener("pagehide", store.flushDeletes);
