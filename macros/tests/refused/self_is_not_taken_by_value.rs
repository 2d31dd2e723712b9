#[hopline::service]
trait Demo {
    async fn put(self);
}

fn main() {}
