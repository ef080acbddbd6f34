import { render } from "preact";
import { App } from "./app";
import { startKeeping, startTheme, watchStatus } from "./store";

startTheme();
startKeeping();
render(<App />, document.getElementById("page")!);
void watchStatus();
