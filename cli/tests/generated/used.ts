// Uses shop.ts over a transport that answers by itself.

import { ShopClient, type Order, type Transport } from "./shop";

const calls: unknown[][] = [];
const transport: Transport = {
  async call(service, method, args) {
    calls.push([service, method, ...args]);
    return 7;
  },
  async oneway(service, method, args) {
    calls.push([service, method, ...args]);
  },
};

const shop = new ShopClient(transport);
const order: Order = { lines: [{ type: "Book", unitPrice: 3, size: [1, 2] }], labels: {} };
const total: number = await shop.total(order);
await shop.note("hello");
const expected = [["shop.v2", "total", order, null], ["shop.v2", "note", "hello"]];
if (total !== 7 || JSON.stringify(calls) !== JSON.stringify(expected)) {
  throw new Error(JSON.stringify(calls));
}

// @ts-expect-error: not a number
void (() => shop.add(1, "x"));
