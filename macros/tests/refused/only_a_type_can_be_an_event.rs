#[hopline::event(key = "order.created")]
fn created(id: u64) {}

fn main() {}
