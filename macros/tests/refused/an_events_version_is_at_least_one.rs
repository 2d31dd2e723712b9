#[hopline::event(key = "order.created", version = 0)]
struct Created {
    id: u64,
}

fn main() {}
