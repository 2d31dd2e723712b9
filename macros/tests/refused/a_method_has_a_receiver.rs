#[hopline::service]
trait Demo {
    async fn put(value: u8);
}

fn main() {}
