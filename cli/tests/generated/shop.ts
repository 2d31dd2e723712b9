// Calls the service `shop.v2`.
// Written by `hopline generate typescript` from its schema: generate it anew instead of changing it.

export type Kind = "Book" | "Food";

export type Line = {
  "extra"?: Line | null;
  "size": [number, number];
  "type": Kind;
  "unitPrice": number;
};

export type Order = {
  "express"?: boolean;
  "labels": { [key: string]: number };
  "lines": (Line)[];
  "note"?: string | null;
};

export type ShopError = "Closed" | { "TooMuch": ShopErrorTooMuch } | { "Unknown": string };

export type ShopErrorTooMuch = {
  "limit": number;
};

/** Makes the calls, by docs/wire.md of Hopline. It rejects with the errors, the method's own ones among them. */
export interface Transport {
  call(service: string, method: string, args: unknown[]): Promise<unknown>;
  oneway(service: string, method: string, args: unknown[]): Promise<void>;
}

export class ShopClient {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  async add(a: number, b: number): Promise<number> {
    return (await this.#transport.call("shop.v2", "add", [a, b])) as number;
  }

  async last_order(): Promise<Order | null> {
    return (await this.#transport.call("shop.v2", "last-order", [])) as Order | null;
  }

  async note(line: string): Promise<void> {
    await this.#transport.oneway("shop.v2", "note", [line]);
  }

  async total(order: Order, discount: number | null = null): Promise<number> {
    return (await this.#transport.call("shop.v2", "total", [order, discount])) as number;
  }

  // `opaque` is left out: its types have no schema.
}
