#[hopline::event(name = "order.created", key = "a", key = "b")]
struct Created {
    id: u64,
}

fn main() {}
