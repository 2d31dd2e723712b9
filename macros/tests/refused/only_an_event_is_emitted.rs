fn emits(client: &hopline::Client) {
    let _ = client.emit(&7_u64);
}

fn main() {}
