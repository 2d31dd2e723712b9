#[hopline::service]
trait Demo {
    async fn put(&self, ctx: &mut Context);
}

fn main() {}
